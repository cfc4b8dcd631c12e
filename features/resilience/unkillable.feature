@double
Feature: Processes that cannot be killed
  A process that hangs in a driver survives even SIGKILL, for minutes or until the host is restarted.
  hive waits for no such process: it says which one and where it hangs, leaves its device alone, and
  goes on with everything else.

  Background:
    Given the setting timeouts.cleanup_s is 0.3
    And the setting timeouts.kill_s is 0.5

  Rule: Whoever survives SIGKILL is named, and nobody waits for it

    @R023 @R048 @R075 @R154
    Scenario: An engine hangs in the driver
      Given two GPUs, of which the second has the name that sorts first
      And a model on cuda:0
      And a second model on cuda:1
      And hive is serving
      And the engine hangs in the kernel
      And somebody asks all the time whether hive is alive
      When the worker is asked to stop
      Then the worker is lost within 3 seconds
      And the worker's reason names that process, and where it hangs
      And the worker's error is CUDA_DEVICE_FAILED
      And "hive leaks" names that process, and where it hangs
      And the metrics count 1 leak of process
      And the metrics say that the worker is LOST
      And the metrics say that cuda:0 is LOST
      And the model "other" is ready, but "llama" is not
      And every time there was an answer, at once

    Scenario: While it hangs, no other one is started for it
      Given a GPU
      And a model on cuda:0
      And hive is serving
      And the worker is lost, for its engine hangs in the kernel
      When the operator runs "worker start llama-0"
      Then the command ends with 1
      And it complains "CONFLICT"
      And it still hangs
      And the engine was started 1 time

    Scenario: While it hangs, its device is not trusted
      Given a GPU
      And a model on cuda:0
      And hive is serving
      And the worker is lost, for its engine hangs in the kernel
      When a client sends "POST" to "/hive/v1/devices/cuda:0/release"
      Then it is refused with 500 CUDA_DEVICE_FAILED
      And the metrics say that cuda:0 is LOST

  Rule: What the kernel lets go at last is cleaned up at once

    @R023 @R145 @R146 @R153
    Scenario: It ends after all
      Given an engine that uses shared memory
      And hive is serving
      And the worker is lost, for its engine hangs in the kernel
      When the kernel lets it go
      Then the worker comes to rest, stopped
      And every process of the engine is gone
      And its shared memory is gone
      And its sockets and temporary files are gone
      And there are no leaks
      And the log has a line "leak cleared" with the kind "process"
      And the metrics count 1 exit by asked

    @R013 @R014
    Scenario: Its device is not used again before an operator says so
      Given a GPU
      And a model on cuda:0
      And hive is serving
      And the worker is lost, for its engine hangs in the kernel
      And the kernel lets it go
      And the worker is stopped
      When the worker is asked to start
      Then the worker is quarantined
      And the engine was started 1 time

    Scenario: An operator says so
      Given a GPU
      And a model on cuda:0
      And hive is serving
      And the worker is lost, for its engine hangs in the kernel
      And the kernel lets it go
      And the worker is stopped
      And the worker was started in vain
      When the operator runs "worker release llama-0 --wait 10"
      Then the command ends with 0
      And the worker becomes ready
      And the metrics say that cuda:0 is OK

  Rule: hive itself ends all the same, and says what it leaves

    @R022 @R023 @R048 @R061
    Scenario Outline: hive is asked to stop <when>
      Given an engine that behaves
      And hive is serving
      And <state>
      When hive is asked to stop
      Then hive ends within 5 seconds with exit code 1
      And the last line of the log is the error RESOURCE_LEAK_DETECTED
      And the error counts 1 leaked process, and says how to clean up
      And it still hangs

      Examples:
        | when                          | state                                               |
        | while a process hangs         | the worker is lost, for its engine hangs in the kernel |
        | and only then a process hangs | the engine hangs in the kernel                      |

    @R023 @R145 @R153
    Scenario: The engine's guard stays, and cleans up when it can
      Given an engine that uses shared memory
      And hive is serving
      And the engine hangs in the kernel
      And hive has stopped
      When the kernel lets it go
      Then every process of the engine is gone
      And its shared memory is gone
      And its sockets and temporary files are gone
