@double
Feature: Metrics
  An operator who is not told by numbers is told by customers.
  The numbers are those of the clients: every request once, under the status that it got.

  Rule: Every client's request is counted once, by what was sent

   
    Scenario: Recounted from what the engine wrote down
      Given hive is serving
      When a client asks for 7 chats in turn
      Then the metrics count what the engine saw
      And the metrics count 7 requests with 200
      And the metrics count 0 requests in flight

    Scenario: A refusal is counted under its code
      Given an engine that never finishes loading
      And hive has just started
      When a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the metrics count 1 failure with SERVICE_UNAVAILABLE

    Scenario: What is running is shown, and goes when its client goes
      Given an engine that generates for a minute
      And hive is serving
      And 2 chats are streaming
      When the client leaves
      Then the metrics count 1 requests in flight
      And the metrics count 1 requests with 499

  Rule: A worker's life can be read from the numbers

    Scenario: A crash
      Given an engine that behaves
      And hive is serving
      When the engine crashes with a segmentation fault
      Then the worker becomes ready again
      And the metrics count 2 starts of the worker
      And the metrics count 1 exit by signal
      And the metrics say that the worker is READY

  Rule: Everything is there from the start

    Scenario Outline: <family>
      Given an engine that never finishes loading
      When hive starts
      Then the metrics show the family "<family>"

      Examples:
        | family                       |
        | hive_requests_total          |
        | hive_event_loop_lag_seconds  |
