@double
Feature: Streaming
  People read while the model writes, so a token that waits is a token that is late.
  Every token is passed on as it comes: each one once, in order, and to the right client.

  Rule: A stream arrives whole, in order, and as it is generated

    Scenario: Tokens are passed on one by one
      Given an engine that takes 20 ms for each token
      And hive is serving
      When another client asks for a streamed chat
      Then 16 tokens arrive, all of them and in order
      And the first token arrived long before the last
      And the stream is complete

    Scenario: A fast engine loses nothing
      Given an engine that generates 5000 tokens as fast as it can
      And hive is serving
      When another client asks for a streamed chat
      Then 5000 tokens arrive, all of them and in order
      And the stream is complete

    Scenario: Many streams at once do not mix
      Given an engine that takes 20 ms for each token
      And hive is serving
      When 40 clients ask for a streamed chat at once
      Then each of them gets its own 16 tokens, all of them and in order

  Rule: Every kind of stream keeps its engine's own events

    Scenario Outline: A <kind> as a stream
      Given hive is serving
      When a client asks for a <kind> as a stream
      Then the stream is complete

      Examples:
        | kind       |
        | completion |
        | message    |
