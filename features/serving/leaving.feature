@double
Feature: Clients that leave
  Nobody reads what a client that has gone asked for, but an engine would go on generating it.
  Hive notices, and takes the work away from the engine.

  Rule: A client that leaves frees its place in the engine

   
    Scenario: In the middle of a stream
      Given an engine that generates for a minute
      And hive is serving
      And a chat is streaming
      When the client leaves
      Then the engine is idle
      And the engine saw that the client had left

   
    Scenario: Before the first token
      Given an engine that never comes to the first token
      And hive is serving
      And a chat waits for its first token
      When the client leaves
      Then the engine is idle

   
    Scenario: Without a stream
      Given an engine that never comes to the first token
      And hive is serving
      And a chat is being generated that is not streamed
      When the client leaves
      Then the engine is idle

  Rule: Nobody else notices

    @R154
    Scenario: The others read on
      Given an engine that generates for a minute
      And hive is serving
      And 3 chats are streaming
      When the client leaves
      Then the engine still generates for 2
      And the worker stays ready
