@double
Feature: Cold start
  An engine needs seconds or minutes before it can generate anything.
  Hive answers from its first moment, and never calls a model ready before it is.

  Rule: While a model loads, clients are told so, and when to come back

    @R030 @R040 @R043 @R058
    Scenario: A chat arrives while the model is loading
      Given an engine that takes a second to load
      And hive has just started
      When a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "loading"
      And it is told when to come back

    Scenario: The same chat a moment later
      Given an engine that takes a second to load
      And hive is serving
      When a client asks for a chat
      Then the answer is 200
      And the worker's load took at least 1 second

  Rule: Hive is alive at once, and ready when a model is

    Scenario: Every model is still loading
      Given an engine that never finishes loading
      When hive starts
      Then hive is alive, but not ready

    @R154
    Scenario: One model can serve, another cannot
      Given an engine that behaves
      And a second model, "qwen", with an engine that never finishes loading
      When hive starts
      Then the model "llama" is ready, but "qwen" is not

  Rule: Ready means that the engine has generated a token, not only that it says so

    Scenario: The engine calls itself healthy, but its work fails
      Given an engine that is healthy but generates nothing
      And hive has just started
      When a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the model is not ready

    Scenario: The same engine comes round
      Given an engine that is healthy but generates nothing
      And hive has just started
      When the engine begins to generate
      Then the worker becomes ready

    Scenario: The engine listens before it is healthy
      Given an engine that is healthy only after half a second
      When hive starts
      Then the model is not ready
      And the worker becomes ready
