@double
Feature: Restarts
  Most crashes happen once, and a restart heals them; an engine that crashes at every start only
  wears the machine out. Hive restarts it a few times, then stops and says why.

  Rule: A worker that crashed comes back by itself

    Scenario: One crash
      Given an engine that behaves
      And hive is serving
      When the engine crashes with a segmentation fault
      Then the worker becomes ready again
      And the engine was started 2 times
      And every process of the engine is gone

    Scenario: It keeps its name and its clients' address
      Given an engine that behaves
      And hive is serving
      When the worker's first process is killed
      Then the worker becomes ready again
      And the model is ready

  Rule: A worker that keeps failing is given up, with the reason

    Scenario: It cannot load
      Given the setting restarts.starts is 2
      And an engine that fails to load
      When hive starts
      Then the worker is given up
      And the engine was started 3 times
      And the worker's reason says "gave up after 2 restarts"
      And the worker's reason quotes the engine's last words
      And the worker's error is WORKER_CRASHED

    Scenario: It ends soon after every start, though with success
      Given the setting restarts.starts is 2
      And an engine that exits with success a moment after it was ready
      When hive starts
      Then the worker is given up
      And the worker's reason says "exit status 0"

    @R040
    Scenario: Its clients are not asked to come back
      Given the setting restarts.starts is 0
      And an engine that fails to load
      And hive has just started
      And the worker has failed
      When a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "worker_failed"
      And it is not told to come back

    @R076
    Scenario: The reason keeps secrets
      Given the setting restarts.starts is 0
      And an engine that prints a key and fails to load
      When hive starts
      Then the worker is given up
      And the worker's reason shows neither the key nor the path

   
    Scenario: It never gets ready
      Given the setting timeouts.load_s is 0.4
      And the setting restarts.starts is 1
      And an engine that never answers its health check
      When hive starts
      Then the worker is given up
      And the worker's error is LOADING_TIMEOUT

  Rule: An operator's start is a fresh start

    Scenario: A failed worker is started again
      Given the setting restarts.starts is 0
      And an engine that behaves
      And hive is serving
      And the engine crashed for good
      When the operator runs "worker start llama-0 --wait 5"
      Then the command ends with 0
      And the worker becomes ready again

    Scenario: It waits for its next attempt, and the operator does not want to
      Given the setting restarts.backoff_s is 30
      And an engine that behaves
      And hive is serving
      And the engine crashed and restarts in half a minute
      When the operator runs "worker start llama-0 --wait 5"
      Then the command ends with 0
