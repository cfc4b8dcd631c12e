@double
Feature: Thawing a window
  A thaw believes nothing. It checks every byte, compares the model field by field, and is proved by
  what the engine itself says at the next request.

  Rule: A thaw proves itself

    @R103
    Scenario: Into a new session
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      When a client thaws "monday"
      Then it has the messages, and a receipt for every full chunk
      And after the next request the window's receipt has the engine's own count
      And the metric hive_thaw_tokens_total has both

    Scenario: Into its own session
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      When a client thaws "monday" into the session
      Then the session takes requests

    Scenario: After hive was started anew
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      When hive is stopped and started again
      And a client thaws "monday"
      Then it has the messages, and a receipt for every full chunk
      And after the next request the window's receipt has the engine's own count

    Scenario: hive is started anew before the next request
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      When a client thaws "monday"
      Then it has the messages, and a receipt for every full chunk
      When hive is stopped and started again
      Then after the next request the window's receipt has the engine's own count

    Scenario: LMCache has lost every file of it
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      When hive is stopped, the KV tier is emptied, and hive is started again
      And a client thaws "monday"
      Then it has the messages, and a receipt for every full chunk
      And after the next request the window's receipt has the engine's own count

  Rule: What is damaged is told, and never used

    @R085 @R105
    Scenario: A block in the middle is missing
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And block 3 of "monday" is missing, in the KV tier as well
      When hive is stopped and started again
      And a client thaws "monday"
      Then the receipt ends before block 3, and says that it is partial
      And the answer warns of 1 block
      And after the next request the engine's own count is what the receipt promised

    @R105
    Scenario: A block in the middle is damaged
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And block 3 of "monday" is damaged
      When a client thaws "monday"
      Then the receipt ends before block 3, and says that it is partial
      And the damaged block is neither in the window nor in the KV tier

    @R085
    Scenario: All of it or nothing
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And block 3 of "monday" is missing, in the KV tier as well
      When a client thaws "monday", all of it or nothing
      Then it is refused with 409 BLOCK_NOT_FOUND
      And its number is CWM-2003

    @R104 @R092
    Scenario: Nothing is left of it
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And every block of "monday" is damaged
      When a client thaws "monday"
      Then it is refused with 500 STORAGE_CORRUPTED
      And its number is CWM-4004

    Scenario: The model is another one now
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      When hive is stopped and started again with "--dtype=float32" for the engine
      And a client thaws "monday"
      Then it is refused with 409 MODEL_INCOMPATIBLE
      And the answer names "dtype"

    @R117 @R118
    Scenario: The operator finds what is damaged, and repairs it
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And block 3 of "monday" is damaged
      When the operator runs "window diagnose --check-integrity"
      Then the command ends with 1
      And it prints "monday"
      When the operator runs "window repair monday --attempt-recovery"
      Then the command ends with 0
      When the operator runs "window diagnose --check-integrity"
      Then the command ends with 0
