@double
Feature: Cancelling
  A request that nobody wants any more is ended in the engine, and its slot is free when the engine
  has really stopped working on it, not before.

  Rule: Whoever may, can cancel a request by its id

    Scenario: A stream
      Given an engine that generates for a minute
      And hive is serving
      And a chat is streaming with the request id "mine"
      When a client sends "DELETE" to "/hive/v1/requests/mine"
      Then the answer is 204
      And the stream ends with the error REQUEST_CANCELLED
      And the engine is idle
      And the metrics count 0 requests in flight
      And the log has one access line for "mine", with 200

    Scenario: It is over already
      Given hive is serving
      And a client has asked for a chat with the request id "mine"
      When a client sends "DELETE" to "/hive/v1/requests/mine"
      Then the answer is 204

    @R036
    Scenario: Nobody knows it
      Given hive is serving
      When a client sends "DELETE" to "/hive/v1/requests/nobodys"
      Then it is refused with 404 NOT_FOUND

    Scenario: It is another key's
      Given an engine that generates for a minute
      And an API key "mine" with the scope "inference"
      And an API key "other" with the scope "inference"
      And hive is serving
      And "mine" streams a chat with the request id "r1"
      When "other" cancels "r1"
      Then it is refused with 404 NOT_FOUND
      And the stream goes on

    Scenario: While it waits for a slot
      Given an engine that generates for a minute
      And the model's max_concurrent is 1
      And hive is serving
      And a chat is streaming
      And a chat with the request id "mine" is waiting for a slot
      When a client sends "DELETE" to "/hive/v1/requests/mine"
      Then the answer is 204
      And the waiting client is told REQUEST_CANCELLED
      And the metrics count 0 waiting and 1 in flight

  Rule: A slot is free when the engine has stopped

    @R050
    Scenario: The engine takes its time
      Given an engine that takes 0.4 seconds to end what was cancelled
      And the model's max_concurrent is 1
      And hive is serving
      And a chat is streaming
      When the client leaves
      Then the next chat gets its slot after 0.4 seconds
      And the metrics count 1 confirmed cancellation

    Scenario: An engine without gauges
      Given an engine that generates for a minute
      And the model's running is none
      And hive is serving
      And a chat is streaming
      When the client leaves
      Then the metrics count 0 requests in flight
      And the metrics count 1 unknown cancellation

    @R050
    Scenario: Everybody leaves at once
      Given an engine that generates for a minute
      And hive is serving
      And 20 chats are streaming
      When every client leaves
      Then the engine is idle
      And the metrics count 0 requests in flight
      And the metrics count 20 confirmed cancellations
