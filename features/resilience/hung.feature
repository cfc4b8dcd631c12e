@double
Feature: An engine that hangs
  It is there, its health check is fine, and nothing comes. Only progress tells: tokens, KV cache,
  CPU time. What makes none is ended, and another one is started.

  Background:
    Given the setting timeouts.cleanup_s is 0.5
    And the setting timeouts.inference_s is 0.5
    And the setting timeouts.stall_s is 0.5

  Rule: A request that does not end when it is cancelled gives the hang away

    @R048 @R050 @R051
    Scenario: What was cancelled runs on
      Given an engine that never ends what was cancelled, and stands still
      And hive is serving
      And a chat is streaming
      When the client leaves
      Then the worker hangs, is ended and becomes ready again
      And every process of the engine is gone
      And the metrics count 1 exit by hung

    Scenario: It gets on with other work
      Given an engine that never ends what was cancelled, but generates
      And hive is serving
      And 2 chats are streaming
      When the first client leaves
      Then the worker stays ready for 2 seconds
      And the stream goes on

  Rule: Work that makes no progress gives it away, too

    @R039 @R154
    Scenario: The engine is stopped in the middle of its work
      Given an engine that generates for a minute
      And it runs as three processes
      And hive is serving
      And 2 chats are streaming
      When the whole engine is stopped like by a debugger
      Then every stream ends with an error, INFERENCE_TIMEOUT or WORKER_HUNG
      And the worker hangs, is ended and becomes ready again
      And every process of the engine is gone

    Scenario: A long prefill is no hang, though its client was given up
      Given an engine that has a prefill of 3 seconds, in steps of 2 seconds
      And hive is serving
      When a client asks for a chat
      Then it is refused with 504 INFERENCE_TIMEOUT
      And the metrics count 1 confirmed cancellation
      And the worker's processes are the same
