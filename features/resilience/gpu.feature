@gpu
Feature: A real GPU
  A double of the driver shows what hive makes of what a driver tells. Only a GPU shows that a driver
  tells it, that VRAM goes and comes back with its processes, and what torch really says at its end.

  Background:
    Given a real GPU on which nobody computes
    And a model on it whose engine holds 4 GiB with torch

  Rule: What is there is listed and watched, and the engine gets that and nothing else

    Scenario: The GPUs of the host, without a daemon
      When the operator runs "devices --local --json"
      Then the command ends with 0
      And the GPU is listed as the driver itself tells it

    Scenario: The GPU that hive serves on
      Given hive is serving on the GPU
      When the operator runs "devices --json"
      Then the command ends with 0
      And the GPU is listed as the driver itself tells it
      And the metrics tell the GPU's memory
      And the metrics say that cuda:0 is OK

    Scenario: The engine is given the GPU that is configured
      Given hive is serving on the GPU
      Then torch sees that GPU and no other

  Rule: VRAM is measured before a start, held by the engine's own process, and proved returned

    @R023
    Scenario: While it serves
      Given hive is serving on the GPU
      Then the GPU has 4 GiB less
      And the engine's process is named for them, where the driver shows processes

    @R023 @R153
    Scenario: The engine was asked to stop
      Given hive is serving on the GPU
      When the worker is asked to stop
      Then the worker comes to rest, stopped
      And its receipt says returned, or unproven where the driver shows no processes
      And the GPU has all of it back
      And there are no leaks

    @R023 @R145 @R153
    Scenario Outline: The engine was killed, and the memory was held by <whom>
      Given its memory is held by <whom>
      And the setting restarts.starts is 0
      And hive is serving on the GPU
      When the worker's first process is killed
      Then the worker is given up
      And every process of the engine is gone
      And its receipt says returned, or unproven where the driver shows no processes
      And the GPU has all of it back
      And there are no leaks

      Examples:
        | whom               |
        | the engine itself  |
        | a process that hid |

    @R023 @R153
    Scenario: Hive itself was killed
      Given its memory is held by a process that hid
      And hive is serving on the GPU
      When hive is killed
      Then every process of the engine is gone
      And the GPU has all of it back

  Rule: What cannot be served is refused before anything is started

    @R016 @R017 @R018 @R021 @R061
    Scenario: Another process holds the GPU
      Given another process holds 2 GiB of the GPU
      When hive is started and ends by itself
      Then it ends within 20 seconds with exit code 1
      And its last line is the error CUDA_DEVICE_FAILED, for programs to read
      And it names "cuda:0"
      And it names who holds the GPU
      And it says what to do
      And nothing was started on it

    @R013 @R014 @R015 @R016 @R017 @R019 @R021 @R061
    Scenario: The model needs more than there is
      Given the model is known to need 8 GiB more than the GPU has
      And the model may be replaced by "small"
      When hive is started and ends by itself
      Then it ends within 20 seconds with exit code 1
      And its last line is the error GPU_VRAM_EXHAUSTED, for programs to read
      And the error tells what was asked for and what the driver had left
      And it tells "small" as an alternative, which was not started either
      And nothing was started on it

  Rule: What torch says at its end is understood

    @R016 @R019
    Scenario: Out of memory while it loads
      Given its engine needs 8 GiB more than the GPU has
      When hive is started on the GPU and ends by itself
      Then it ends with exit code 1
      And its last line is the error GPU_VRAM_EXHAUSTED, for programs to read
      And the error tells what was asked for and what the driver had left
      And the GPU has all of it back

    @R016 @R019 @R021
    Scenario: Out of memory while it serves
      Given hive is serving on the GPU
      And a chat is streaming
      When the engine asks for 8 GiB more than the GPU has left
      Then the stream ends with the error GPU_VRAM_EXHAUSTED
      And the error tells what was asked for and what the driver had left
      And hive ends within 15 seconds with exit code 1
      And the last line of the log is the error GPU_VRAM_EXHAUSTED
      And every process of the engine is gone
      And the GPU has all of it back

    @R019
    Scenario: Out of memory, and only the device is given up
      Given the setting server.gpu_error_policy is quarantine
      And hive is serving on the GPU
      When the engine takes all that is left, GiB by GiB
      Then it is refused with 500 GPU_VRAM_EXHAUSTED
      And the error tells what was asked for and what the driver had left
      And the worker is quarantined
      And the worker's error is GPU_VRAM_EXHAUSTED
      And the GPU has all of it back

    Scenario: An operator trusts it again
      Given the setting server.gpu_error_policy is quarantine
      And hive is serving on the GPU
      And the engine has run out of the GPU's memory
      When the operator runs "worker release llama-0"
      Then the command ends with 0
      And the engine comes back
      And the metrics say that cuda:0 is OK

    Scenario: A kernel that reads out of bounds is the engine's own fault, not the device's
      Given hive is serving on the GPU
      And a chat is streaming
      When a kernel of the engine reads out of bounds
      Then the stream ends with the error WORKER_CRASHED
      And the engine comes back
      And the metrics say that cuda:0 is OK
