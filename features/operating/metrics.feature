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

  Rule: Under load the numbers are still those of the clients and of the engines

    @R183 @R184 @R252
    Scenario: A mixed load is recounted
      Given two models, the first with little room
      And hive serves whoever has a key
      When many clients ask both for everything, some too soon, some too long, and some leave
      And the second engine hangs up once and fails now and then
      And the first engine crashes while it answers
      Then the metrics count what the clients counted
      And the metrics count what the engines wrote down
      And the metrics count each call of an operation by its outcome
      And the metrics time one recovery of the first engine
      When clients make up models, paths, methods, keys and ids
      Then no series has been added by that

  Rule: The engines' own numbers are on the same page

    Scenario: Each engine's under the name of its worker, whatever one of them does
      Given two models, the first with little room
      And hive is serving
      Then the page has both engines' numbers beside hive's
      And the page can be read as text, as OpenMetrics and by promtool
      When the second engine does not answer for its metrics any more
      Then the page is there without the second engine's numbers, and says so
      When the second engine does not exist any more
      Then the page is there without the second engine's numbers

  Rule: Everything is there from the start

    Scenario Outline: <family>
      Given an engine that never finishes loading
      When hive starts
      Then the metrics show the family "<family>"

      Examples:
        | family                       |
        | hive_requests_total          |
        | hive_event_loop_lag_seconds  |
