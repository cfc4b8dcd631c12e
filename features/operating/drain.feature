@double
Feature: Draining
  Before a host is taken away its clients go elsewhere, and what runs may finish.

  Rule: POST /hive/v1/drain is a clean stop

    Scenario: With a request that runs
      Given an engine that takes 20 ms for each token
      And hive is serving
      And a chat is streaming
      When a client sends "POST" to "/hive/v1/drain"
      Then the answer is 202
      And hive is not ready, and says that it drains
      And 16 tokens arrive, all of them and in order
      And hive ends within 5 seconds with exit code 0

    Scenario: A request pauses before it is sent again
      Given an engine that hangs up on its next 9 requests
      And hive is serving
      And a chat will be sent again in a moment
      When a client sends "POST" to "/hive/v1/drain"
      Then the waiting client is told to come back, for hive drains
      And hive ends within 5 seconds with exit code 0

    Scenario: A service manager stops hive meanwhile
      Given an engine that takes 20 ms for each token
      And hive is serving
      And a chat is streaming
      When a client sends "POST" to "/hive/v1/drain"
      And hive is asked to stop
      Then 16 tokens arrive, all of them and in order
      And hive ends within 5 seconds with exit code 0

    Scenario: A second signal in it ends the waiting
      Given an engine that generates for a minute
      And hive is serving
      And a chat is streaming
      When a client sends "POST" to "/hive/v1/drain"
      And hive is asked to stop again and again
      Then hive ends within 3 seconds with exit code 0

  Rule: One worker can be drained alone

    Scenario: The others serve on
      Given an engine that takes 20 ms for each token
      And a second model, "other", with an engine that behaves
      And hive is serving
      And a chat is streaming
      When a client sends "POST" to "/hive/v1/workers/llama-0/drain"
      And a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "draining"
      And 16 tokens arrive, all of them and in order
      And the worker comes to rest, stopped
      And a client can chat with "other"
