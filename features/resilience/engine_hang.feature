@engine
Feature: The real engine is cancelled, hangs, and is drained
  vLLM acts on an abort after its current step, and says nothing during a long prefill. hive must know
  when a slot is really free, tell a long prefill from a hang, and end what hangs.

  Rule: What nobody wants any more stops in the engine

    @R050
    Scenario Outline: A reader <does>
      Given the real engine is serving
      And a client is reading a long answer
      When the reader <does>
      Then the engine runs nothing any more, by its own count
      And the slot is free, and the cancellation was confirmed

      Examples:
        | does                   |
        | leaves                 |
        | cancels its request    |
        | has a deadline of a second, and it passes |

    Scenario: A long prefill is no hang
      Given the real engine is serving
      When a client asks about 15000 tokens, and has no patience
      Then it is told REQUEST_TIMEOUT
      And the engine runs nothing any more, by its own count
      And the worker is still the same

  Rule: What makes no progress is ended, whatever its health check says

    @R048 @R051 @R154
    Scenario: EngineCore is stopped
      Given the real engine is serving
      And one client is reading a long answer, and one waits for a whole answer
      When EngineCore is stopped, and one more client leaves
      Then the others are told WORKER_HUNG within 20 seconds
      And the worker is ready again by itself
      And no process, socket or shared memory of the old engine remains

  Rule: A worker is drained without cutting anybody off

    @R040 @R053
    Scenario: While a client is reading
      Given the real engine is serving
      And a client is reading an answer of 400 tokens
      When the worker is drained
      Then the whole answer arrives
      And the worker is stopped, and begins to start when that is asked for
