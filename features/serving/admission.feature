@double
Feature: Admission
  A worker does so many requests at once, so many more may wait a little, and everybody else is told
  at once when to come back. A refusal costs nothing and is honest.

  Background:
    Given an engine that generates for a minute
    And the model's max_concurrent is 2
    And the model's queue_depth is 2

  Rule: Who finds no slot and no place is refused at once

    @R054 @R055 @R056 @R057 @R058 @R059 @R040 @R043 @R031
    Scenario: Slots and waiting room are full
      Given hive is serving
      And 2 chats are streaming
      And 2 chats are waiting for a slot
      When a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "queue_full"
      And it is told when to come back
      And it is told that 2 of 2 slots are busy
      And the answer came within 0.3 seconds
      And the engine saw 2 requests
      And the log has a line "request" with the level "warning"
      And the metrics count 1 refusal as queue_full

    Scenario: Nobody may wait
      Given the model's queue_depth is 0
      And hive is serving
      And 2 chats are streaming
      When a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "slots_busy"

  Rule: Who waits goes in as soon as a slot is free

    Scenario: In the order of arrival
      Given hive is serving
      And 2 chats are streaming
      And 2 chats are waiting for a slot
      When the first client leaves
      Then the third client gets tokens, and the fourth waits on
      And the metrics count 1 waiting and 2 in flight

    Scenario: The more urgent one first
      Given hive is serving
      And 2 chats are streaming
      And a chat with priority batch is waiting for a slot
      And a chat with priority interactive is waiting for a slot
      When the first client leaves
      Then the fourth client gets tokens, and the third waits on

    Scenario: A client that leaves the waiting room frees its place
      Given hive is serving
      And 2 chats are streaming
      And 2 chats are waiting for a slot
      When the client leaves
      Then the metrics count 1 waiting and 2 in flight
      And the engine saw 2 requests
      And a place in the waiting room is free

  Rule: Nobody waits for ever

    @R040
    Scenario: No slot became free in time
      Given the setting timeouts.queue_s is 0.5
      And hive is serving
      And 2 chats are streaming
      When a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "queue_timeout"
      And it is told when to come back
      And the answer came after 0.5 seconds, but within 1
      And the metrics count 1 timeout in phase queue

    Scenario: hive stops meanwhile
      Given hive is serving
      And 2 chats are streaming
      And 2 chats are waiting for a slot
      When hive is asked to stop
      Then both who waited are refused with 503 SERVICE_UNAVAILABLE, draining

    @R153
    Scenario: The engine dies meanwhile
      Given the setting restarts.backoff_s is 5
      And hive is serving
      And 2 chats are streaming
      And 2 chats are waiting for a slot
      When the worker's first process is killed
      Then both who waited are refused with 503 SERVICE_UNAVAILABLE, loading

  Rule: A key has its own limits, and nobody else feels them

    @R037
    Scenario: Too many requests of one key at once
      Given an API key "small" with the scope "inference", at most 1 at once
      And an API key "other" with the scope "inference"
      And hive is serving
      And "small" streams a chat
      When "small" asks for a chat
      Then it is refused with 429 RATE_LIMITED
      And the reason is "max_concurrent"
      And it is told when to come back
      And "other" can stream a chat

    @R037
    Scenario: Too many requests of one key in a minute
      Given an API key "small" with the scope "inference", at most 2 in a minute
      And hive is serving
      And "small" asked for 2 chats
      When "small" asks for a chat
      Then it is refused with 429 RATE_LIMITED
      And the reason is "requests_per_minute"
      And it is told when to come back
