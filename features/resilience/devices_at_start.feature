@double
Feature: Devices are looked at before anything is started
  A model on a GPU that is missing, taken or too small fails after minutes of loading, or is quietly
  moved to somewhere else by whoever starts it. hive looks first, says what is wrong with the
  numbers it measured, and starts nothing. It never chooses another device.

  Rule: What is wrong with a device ends the start, by name and at once

    @R013 @R014 @R016 @R017 @R021 @R061
    Scenario: The driver is missing
      Given a model on cuda:0
      When hive is started and ends by itself
      Then it ends within 5 seconds with exit code 1
      And its last line is the error CUDA_DRIVER_MISSING, for programs to read
      And it names "cuda:0"
      And it says what to do
      And no engine was ever started

    @R013 @R015 @R016 @R017 @R021
    Scenario: The device is not there, but another one is
      Given a GPU
      And a model on cuda:1
      When hive is started and ends by itself
      Then it ends within 5 seconds with exit code 1
      And its last line is the error CUDA_DEVICE_NOT_FOUND, for programs to read
      And it names "cuda:0 (NVIDIA H100, GPU-00000000"
      And no engine was ever started

    @R016 @R017
    Scenario: Another process computes on the device
      Given a GPU
      And another process holds 900 MiB of it
      And a model on cuda:0
      When hive is started and ends by itself
      Then it ends within 5 seconds with exit code 1
      And its last line is the error CUDA_DEVICE_FAILED, for programs to read
      And it names that process
      And no engine was ever started

    @R016 @R017 @R018
    Scenario Outline: <what>
      Given a GPU that <state>
      And a model on cuda:0
      When hive is started and ends by itself
      Then it ends within 5 seconds with exit code 1
      And its last line is the error CUDA_DEVICE_FAILED, for programs to read
      And it names "cuda:0"
      And it names "<named>"
      And no engine was ever started

      Examples:
        | what                              | state                        | named                |
        | A memory row that cannot be mapped | could not remap a memory row | could not remap      |
        | A GPU that is split up            | is split into instances      | MIG                  |
        | A driver that does not answer     | does not answer the driver   | did not answer       |
        | A GPU that fell off the bus       | is lost                      | lost                 |

    @R013 @R015 @R016 @R017 @R019 @R021
    Scenario: The model does not fit
      Given a GPU with 16384 MiB, of which 8000 MiB are used
      And a model on cuda:0
      And the model's required_vram_gib is 14.5
      And the model may be replaced by "small"
      When hive is started and ends by itself
      Then it ends within 5 seconds with exit code 1
      And its last line is the error GPU_VRAM_EXHAUSTED, for programs to read
      And it names "GPU out of memory: 14.5GB required, 8.1GB available"
      And the error tells 14848 MiB required, 8384 MiB available, and "small" as an alternative
      And no engine was ever started

    @R017 @R220
    Scenario: Everything that is wrong is told, not only the first
      Given a GPU with 16384 MiB, of which 8000 MiB are used
      And a model on cuda:0
      And the model's required_vram_gib is 14.5
      And a second model on cuda:7
      When hive is started and ends by itself
      Then it ends within 5 seconds with exit code 1
      And it names "GPU out of memory"
      And it names "cuda:7"

    @R017
    Scenario: The check alone tells the same, as a table
      Given a GPU with 16384 MiB, of which 8000 MiB are used
      And a model on cuda:0
      And the model's required_vram_gib is 14.5
      When the operator runs "check"
      Then the command ends with 1
      And it prints "GPU_VRAM_EXHAUSTED"
      And no engine was ever started

    Scenario: A driver that comes late at boot is waited for
      Given a driver that shows its GPU only after a second
      And the setting server.driver_wait_s is 15
      And a model on cuda:0
      When hive starts
      Then the worker becomes ready

  Rule: An engine is told its device by UUID

    @R020
    Scenario: cuda:N is the driver's number
      Given two GPUs, of which the second has the name that sorts first
      And a model on cuda:1
      And hive is serving
      Then the engine sees the second GPU alone

    @R020
    Scenario: A device may be named by its UUID
      Given two GPUs, of which the second has the name that sorts first
      And a model on the second GPU by its UUID
      And hive is serving
      Then the engine sees the second GPU alone

    @R013 @R014
    Scenario: An engine on the CPU sees no GPU
      Given a GPU
      And an engine that behaves
      And hive is serving
      Then the engine sees no GPU

  Rule: Every start looks again

    @R017
    Scenario: Somebody took the device while the worker was stopped
      Given a GPU
      And a model on cuda:0
      And hive is serving
      And the worker is stopped
      And another process holds 900 MiB of it
      When the worker is asked to start
      Then the worker is given up
      And the worker's error is CUDA_DEVICE_FAILED
      And the worker's reason names that process
      And hive still runs

  Rule: The operator sees what the driver sees

    Scenario: The devices, from the daemon
      Given a GPU
      And a model on cuda:0
      And its engine takes 2048 MiB of the GPU
      And hive is serving
      When the operator runs "devices"
      Then the command ends with 0
      And it prints "NVIDIA H100"
      And it prints "2048 (hive)"

    Scenario: The devices of the host, without a daemon
      Given two GPUs, of which the second has the name that sorts first
      When the operator runs "devices --local"
      Then the command ends with 0
      And it prints "cuda:1"

    Scenario: A device as a client of the API sees it
      Given a GPU
      And a model on cuda:0
      And hive is serving
      When a client gets "/hive/v1/devices/cuda:0"
      Then the answer is 200
      And the answer names "GPU-00000000"
      And the metrics say that cuda:0 is OK
      And the metrics say that cuda:0 has 40 °C, 0 ECC errors and 80 GiB of memory
