@double
Feature: Nothing is left behind
  A process that outlives its daemon keeps its GPU memory, and the next start fails for it.
  What an engine takes is given back, also when everything that could do it was killed.

  Rule: Whatever the engine took is given back when it ends

    @R023 @R026 @R145 @R146 @R153
    Scenario Outline: An engine that <takes>
      Given the setting timeouts.cleanup_s is 0.3
      And an engine that <takes>
      And hive is serving
      When hive is asked to stop
      Then hive ends with exit code 0
      And every process of the engine is gone
      And its sockets and temporary files are gone

      Examples:
        | takes                                          |
        | leaves temporary files                         |
        | has a process that hid in a session of its own |

    @R145 @R153
    Scenario: Shared memory of a killed engine
      Given an engine that uses shared memory
      And hive is serving
      And hive has noted what the engine uses
      When the worker's first process is killed
      Then every process of the engine is gone
      And the worker becomes ready again
      And its shared memory is gone

  Rule: This also holds when hive is killed

    @R023 @R051 @R153
    Scenario Outline: Hive is killed, and the engine <does>
      Given an engine that <does>
      And it runs as three processes
      And it uses shared memory
      And hive is serving
      When hive is killed
      Then every process of the engine is gone
      And its shared memory is gone
      And its sockets and temporary files are gone

      Examples:
        | does                                           |
        | behaves                                        |
        | ignores being asked to end                     |
        | has a process that hid in a session of its own |

    Scenario: A new hive serves from the same directories
      Given an engine that runs as three processes
      And hive is serving
      When hive is killed
      And hive is started again
      Then the model is ready
      And nothing that an earlier engine left is still there

  Rule: Where the kernel can hold an engine's processes together, it does

    @R023 @R145 @R146 @R153
    Scenario: A control group for each engine
      Given hive may make control groups
      And an engine that runs as three processes
      And it has a process that hid in a session of its own, without its environment
      And hive is serving
      And all of the engine is in one control group, which bears its mark
      When the worker is asked to stop
      Then the worker comes to rest, stopped
      And every process of the engine is gone
      And that control group is gone

  Rule: What is another program's lies in nobody's way, and stays where it is

    Scenario Outline: A <thing> in the place of the engine's directory
      Given an engine that behaves
      And another program's <thing> lies where the first engine's home would be
      When hive starts
      Then the worker becomes ready
      And the engine has a home of its own
      And what is another program's is still there
      And there are no leaks

      Examples:
        | thing     |
        | file      |
        | socket    |
        | directory |
        | dead link |
