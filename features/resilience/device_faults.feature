@double
Feature: A device fails while hive serves
  A broken GPU answers slowly, wrongly or never. hive hears of it from the driver, ends what runs
  there, tells every client why, and either ends itself (exit) or keeps the device out of use until
  an operator has repaired it (quarantine). Nothing is ever moved to another device.

  Background:
    Given two GPUs, of which the second has the name that sorts first
    And a model on cuda:0
    And its engine takes 2048 MiB of the GPU
    And it generates for a minute
    And the setting server.driver_call_s is 0.5

  Rule: With gpu_error_policy = "exit" hive kills every engine and ends with 1

    @R013 @R015 @R016 @R018 @R021
    Scenario Outline: <what>
      Given a second model on cuda:1
      And hive is serving
      And a chat is streaming
      When <happens>
      Then the stream ends with the error CUDA_DEVICE_FAILED
      And hive ends within 5 seconds with exit code 1
      And every process of the engine is gone
      And the last line of the log is the error CUDA_DEVICE_FAILED
      And the log says "<named>"

      Examples:
        | what                          | happens                        | named                |
        | A device fault                | the driver reports Xid 79      | fallen off the bus   |
        | A double-bit ECC error        | the driver reports Xid 48      | uncorrectable        |
        | The device is gone            | the GPU falls off the bus      | is lost              |
        | The driver never answers      | the driver hangs               | did not answer       |

    @R016 @R019
    Scenario: The engine runs out of VRAM while it serves
      Given hive is serving
      And a chat is streaming
      When the engine runs out of GPU memory
      Then the stream ends with the error GPU_VRAM_EXHAUSTED
      And hive ends within 5 seconds with exit code 1
      And the last line of the log is the error GPU_VRAM_EXHAUSTED
      And every process of the engine is gone

    @R016 @R019
    Scenario: The engine runs out of VRAM while it loads
      Given its engine needs more GPU memory than there is
      When hive is started and ends by itself
      Then it ends within 10 seconds with exit code 1
      And its last line is the error GPU_VRAM_EXHAUSTED, for programs to read
      And the engine was started 1 time

  Rule: With gpu_error_policy = "quarantine" only that device is given up

    @R013 @R015 @R075
    Scenario Outline: <what>
      Given the setting server.gpu_error_policy is quarantine
      And a second model on cuda:1
      And hive is serving
      And a chat is streaming
      When <happens>
      Then the stream ends with the error CUDA_DEVICE_FAILED
      And every process of the engine is gone
      And the worker is quarantined
      And readiness and metrics say that cuda:0 is <state>
      And the model "other" is ready, but "llama" is not
      And the engine was started 1 time

      Examples:
        | what                     | happens                   | state       |
        | A device fault           | the driver reports Xid 79 | QUARANTINED |
        | The device is gone       | the GPU falls off the bus | LOST        |
        | The driver never answers | the driver hangs          | LOST        |

    @R013 @R075
    Scenario: What clients are told meanwhile
      Given the setting server.gpu_error_policy is quarantine
      And hive is serving
      And the driver has reported Xid 48
      When a client asks for a chat
      Then it is refused with 503 GPU_QUARANTINED
      And it is not told to come back
      And it is told what to do

    Scenario: An operator repaired it
      Given the setting server.gpu_error_policy is quarantine
      And hive is serving
      And the driver has reported Xid 48
      When the operator runs "worker release llama-0 --wait 10"
      Then the command ends with 0
      And the worker becomes ready
      And the metrics say that cuda:0 is OK

    Scenario: What is still broken is not released
      Given the setting server.gpu_error_policy is quarantine
      And hive is serving
      And the GPU has fallen off the bus
      When the operator runs "worker release llama-0"
      Then the command ends with 1
      And it complains "CUDA_DEVICE_FAILED"
      And the worker is quarantined

    Scenario: A start does not go around the quarantine
      Given the setting server.gpu_error_policy is quarantine
      And hive is serving
      And the driver has reported Xid 48
      When the worker is asked to start
      Then the answer is 409
      And the engine was started 1 time

    @R019
    Scenario: Out of memory
      Given the setting server.gpu_error_policy is quarantine
      And hive is serving
      And a chat is streaming
      When the engine runs out of GPU memory
      Then the stream ends with the error GPU_VRAM_EXHAUSTED
      And the worker is quarantined
      And the worker's error is GPU_VRAM_EXHAUSTED

  Rule: What an application did to itself is a crash, not a fault of the device

    Scenario: An application Xid, and then the engine dies
      Given hive is serving
      And a chat is streaming
      When the driver reports Xid 31 and the engine dies of it
      Then the stream ends with the error WORKER_CRASHED
      And the worker becomes ready again
      And the log says "Xid 31 on cuda:0 (a memory page fault"
      And the metrics say that cuda:0 is OK

    Scenario: The words alone mean nothing
      Given hive is serving
      And a chat is streaming
      When the engine dies while it speaks of GPU memory
      Then the stream ends with the error WORKER_CRASHED
      And the worker becomes ready again
      And the metrics say that cuda:0 is OK

    Scenario: The echo of hive's own kill
      Given hive is serving
      When the operator restarts the worker
      And the driver reports Xid 45
      Then the metrics count Xid 45 on cuda:0
      And the worker becomes ready
      And hive still runs

    Scenario: A device that fails right after hive's own kill has failed
      Given hive is serving
      When the operator restarts the worker
      And the driver reports Xid 79
      Then hive ends within 5 seconds with exit code 1
      And the last line of the log is the error CUDA_DEVICE_FAILED

  Rule: A stranger on the device is named

    Scenario: Somebody takes memory beside the engine
      Given hive is serving
      When another process takes 900 MiB of it
      Then the log names that process
      And the worker stays ready

  Rule: After every stop the memory is proved returned

    @R023 @R153
    Scenario: It came back
      Given hive is serving
      When the worker is asked to stop
      Then the worker comes to rest, stopped
      And the VRAM of cuda:0 was returned

    @R022 @R023 @R153
    Scenario: It did not come back
      Given the GPU keeps what its processes held
      And the setting timeouts.cleanup_s is 0.3
      And hive is serving
      When the worker is asked to restart
      Then the worker is quarantined
      And the VRAM of cuda:0 was kept
      And "hive leaks" tells 2048 MiB of VRAM
      And hive ends with exit code 1 when it is asked to stop

    @R023
    Scenario: Nobody can tell
      Given the driver shows no processes
      And hive is serving
      When the worker is asked to restart
      Then the worker becomes ready
      And the VRAM of cuda:0 was unproven
      And there are no leaks
