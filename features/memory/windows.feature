@double
Feature: Keeping windows
  Windows belong to the key that made them. They are listed, cloned and deleted, and survive whatever
  happens to hive.

  Rule: A key has its own windows

    @R084
    Scenario: Another key neither sees nor guesses one
      Given a key "ann" for inference
      And a key "bob" for inference
      And a key "operator" for admin
      And hive is serving a model with windows
      And "ann" has a session that is frozen as "monday"
      When "bob" thaws "monday"
      Then it is refused with 404 WINDOW_NOT_FOUND
      And its number is CWM-2002
      And "bob" sees no windows

    Scenario: Both may use the same name
      Given a key "ann" for inference
      And a key "bob" for inference
      And a key "operator" for admin
      And hive is serving a model with windows
      And "ann" has a session that is frozen as "monday"
      When "bob" has a session frozen as "monday"
      Then the answer is 201

  Rule: A clone shares the blocks

    Scenario: The source is deleted
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      When a client clones "monday" as "copy"
      And a client deletes "monday"
      And a client thaws "copy"
      Then it has the messages, and a receipt for every full chunk
      And the folder of "monday" is gone

  Rule: hive may be killed at any moment

    @R107
    Scenario: The catalogue is damaged
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      When hive is stopped, the catalogue is damaged, and hive is started again
      And a client thaws "monday"
      Then it has the messages, and a receipt for every full chunk
      And the damaged catalogue was set aside
