@double
Feature: Configuration
  A daemon that starts with a wrong setting fails later, at a worse time, for a reason nobody sees.
  Hive reads everything first, and names every key that is wrong, before it does anything.

  Rule: A wrong configuration is refused at once, by name

    @R021 @R049 @R061 @R074
    Scenario Outline: <what>
      Given an engine that behaves
      And the setting <key> is <value>
      When hive is started and ends by itself
      Then it ends within 5 seconds with exit code 1
      And its last line is the error CONFIG_INVALID, for programs to read
      And it names "<named>"
      And it says what to do
      And no engine was ever started

      Examples:
        | what                                | key                  | value    | named          |
        | A key that does not exist           | server.drian_s       | 3        | drain_s        |
        | A value that cannot be              | timeouts.load_s      | -1       | load_s         |
        | Limits that do not fit in each other | timeouts.request_s  | 2        | request_s (2   |
        | Open to the network, but for anyone | server.host          | 0.0.0.0  | hive key new   |

    @R020
    Scenario: A model without a device
      Given an engine that behaves
      And the model names no device
      When hive is started and ends by itself
      Then it ends with exit code 1
      And its last line is the error CONFIG_INVALID, for programs to read
      And it names "device"

    Scenario: No model at all
      Given no model is configured
      When hive is started and ends by itself
      Then it ends with exit code 1
      And it names "no model is configured"

    @R013
    Scenario: The environment hides GPUs behind hive's back
      Given an engine that behaves
      And the environment variable CUDA_VISIBLE_DEVICES is 0
      When hive is started and ends by itself
      Then it ends with exit code 1
      And it names "CUDA_VISIBLE_DEVICES"

    Scenario: The engine's program is not there
      Given a model whose program is not there
      When hive is started and ends by itself
      Then it ends with exit code 1
      And its last line is the error WORKER_SPAWN_FAILED, for programs to read

  Rule: A GPU that is not there is never replaced by anything

    @R013 @R014 @R016 @R021
    Scenario: A GPU is configured where there is no driver
      Given an engine that behaves
      And the model's device is cuda:0
      When hive is started and ends by itself
      Then it ends within 5 seconds with exit code 1
      And its last line says that there is no driver or no such device
      And it names "cuda:0"
      And no engine was ever started

  Rule: What hive keeps is for its user alone

    Scenario: Its directories
      Given an engine that behaves
      When hive starts
      Then hive's own directories are for its user alone

  Rule: Two hives never share what is theirs

    Scenario: Another program has the port
      Given an engine that behaves
      And another program listens on hive's port
      When hive is started and ends by itself
      Then it ends with exit code 70
      And its last line is the error ADDRESS_IN_USE, for programs to read
      And no engine was ever started

    Scenario: Another hive has the directories
      Given hive is serving
      When a second hive is started in the same directories
      Then it ends with exit code 1
      And it names "another hive"
      And the worker stays ready
