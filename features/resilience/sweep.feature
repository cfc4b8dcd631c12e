@double
Feature: After hive and a guard were killed together
  The one case that nobody is left to clean up after is written down, so that the next start does it.
  It has an old list in its hands and ends processes: it must be sure whose they are.

  Background:
    Given an engine that runs as three processes
    And it ignores being asked to end
    And it uses shared memory

  Rule: The next start ends and removes what an earlier hive left

    @R023 @R143 @R145 @R153
    Scenario: Everything that is on record
      Given it has a process that hid in a session of its own
      And hive is serving
      And hive and the engine's guard were killed together
      And a part of the engine lives on
      When hive is started again
      Then the model is ready
      And nothing that an earlier engine left is still there
      And the log says "left by an earlier hive: process"

    @R023 @R145 @R153
    Scenario: Who is on no record is known by its control group
      Given hive may make control groups
      And it has a process that hid in a session of its own, without its environment
      And hive is serving
      And hive and the engine's guard were killed together
      And the guard's record of it is lost
      When hive is started again
      Then the model is ready
      And every process of the engine is gone

  Rule: What is somebody else's by now is not touched

    Scenario: A pid that was given to another program
      Given hive is serving
      And hive and the engine's guard were killed together
      And the pid of its first process is another program's since
      When hive is started again
      Then the model is ready
      And nothing that an earlier engine left is still there
      And the other program is not touched

    Scenario: A name that another program took
      Given hive is serving
      And hive and the engine's guard were killed together
      And the name of its shared memory is another program's since
      When hive is started again
      Then the model is ready
      And nothing that an earlier engine left is still there
      And what is another program's is still there

  Rule: A journal that is not as hive writes it is not obeyed

    Scenario Outline: A page that <is wrong>
      Given a page of the journal that <is wrong>
      When hive starts
      Then the worker becomes ready
      And that page is set aside, and the log says so
      And what is another program's is still there

      Examples:
        | is wrong                          |
        | is cut off                        |
        | is a link                         |
        | names another program's directory |
        | names the host's first process    |

  Rule: An operator can have it done without starting anything

    @R023 @R060 @R145 @R153
    Scenario: hive sweep
      Given hive is serving
      And hive and the engine's guard were killed together
      When the operator runs "sweep"
      Then the command ends with 0
      And it prints "of llama-0 ended"
      And it prints "directory w/1 of llama-0 removed"
      And nothing that an earlier engine left is still there
      And its sockets and temporary files are gone
      And the engine was started 1 time

    @R060
    Scenario: There is nothing to do
      Given hive is serving
      And hive has stopped
      When the operator runs "sweep"
      Then the command ends with 0
      And it prints "nothing was left"

    @R061 @R075
    Scenario: hive runs there
      Given hive is serving
      When the operator runs "sweep"
      Then the command ends with 1
      And it complains "another hive"
      And the worker stays ready

    @R022 @R061
    Scenario: Something stays
      Given hive is serving
      And another program uses a part of the engine's shared memory
      And hive and the engine's guard were killed together
      When the operator runs "sweep"
      Then the command ends with 1
      And it complains "RESOURCE_LEAK_DETECTED"
      And every process of the engine is gone
      And the other program is not touched
