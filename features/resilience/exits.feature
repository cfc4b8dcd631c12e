@double
Feature: How an engine ended
  An engine that was asked to end, one that crashed and one that the kernel killed for memory need
  three different hands. hive tells which it was, in numbers and in words.

  Rule: Every end has a cause

    Scenario Outline: <cause>
      Given an engine that runs as three processes
      And hive is serving
      When <what>
      Then the worker becomes ready again
      And the metrics count 1 exit by <cause>
      And the log has a line "engine exited" with the cause "<cause>"
      And the worker's last exit is "<told>"

      Examples:
        | cause       | what                                              | told                      |
        | asked       | the worker is asked to restart                    | exit status 0             |
        | crashed     | the engine exits with success though nobody asked | exit status 0             |
        | crashed     | the engine dies of a CUDA error                   | exit status 1             |
        | signal      | the engine crashes with a segmentation fault      | signal SIGSEGV            |
        | signal      | the worker's first process is killed              | signal SIGKILL            |
        | guard_lost  | the worker's guard is killed                      | its guard was killed      |

    @R063
    Scenario: Killed by SIGKILL
      Given an engine that behaves
      And hive is serving
      When the worker's first process is killed
      Then the worker becomes ready again
      And the worker's last exit code is 137

  Rule: The kernel's killing for memory is no crash like any other

    @R063 @R153
    Scenario: The host's memory runs out
      Given an engine that behaves
      And hive is serving
      When the engine takes more memory than it may have
      Then the worker becomes ready again
      And every process of the engine is gone
      And the metrics count 1 exit by out_of_memory
      And the log has a line "engine exited" with the cause "out_of_memory"
      And the worker's last exit is "killed by the kernel for memory (out of host RAM)"
      And the worker's last exit code is 137
