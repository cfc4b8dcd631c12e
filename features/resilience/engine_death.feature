@engine
Feature: The real engine dies
  vLLM is a tree of processes, and the death of one leaves the others holding memory, sockets and
  shared memory, while its streams end as if all were well. hive must notice, tell and clean up.

  Rule: Whichever process dies, callers learn it, nothing remains, and the worker heals itself

    @R039 @R145 @R146 @R153
    Scenario Outline: The real <victim> is killed while clients are waiting
      Given the real engine is serving
      And one client is reading a long answer, and one waits for a whole answer
      When the engine's <victim> is killed
      Then each client has a proper exception "WORKER_CRASHED" within 2 seconds
      And readiness was already denied when they saw it
      And the worker is ready again by itself
      And no process, socket or shared memory of the old engine remains

      Examples:
        | victim      |
        | API server  |
        | EngineCore  |
        | guard       |
