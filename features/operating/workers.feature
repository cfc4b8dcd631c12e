@double
Feature: Workers under an operator's hand
  A new engine version, a stuck model, a GPU to be freed: a worker must be stopped and started
  without touching the others. The daemon stays; only this model's clients notice.

  Rule: A worker can be stopped, and stays stopped

    @R040
    Scenario: Its clients are told that it is stopped
      Given hive is serving
      And the worker is stopped
      When a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "worker_stopped"
      And it is not told to come back

    Scenario: Everything that it took is given back
      Given an engine that runs as three processes
      And it uses shared memory
      And hive is serving
      When the worker is asked to stop
      Then the worker comes to rest, stopped
      And every process of the engine is gone
      And its shared memory is gone
      And hive still runs

    Scenario: It is started again
      Given hive is serving
      And the worker is stopped
      When the operator runs "worker start llama-0 --wait 5"
      Then the command ends with 0
      And the worker becomes ready again

    Scenario: It is stopped while it is loading
      Given an engine that never finishes loading
      And hive has just started
      When the worker is asked to stop
      Then the worker comes to rest, stopped
      And hive still runs

  Rule: A restart is a new engine under the old name

    Scenario: Restart
      Given an engine that runs as three processes
      And hive is serving
      When the operator restarts the worker
      Then the worker becomes ready again
      And the worker's processes are new
      And every process of the engine is gone

    Scenario: A request that is running may finish first
      Given an engine that takes 20 ms for each token
      And hive is serving
      And a chat is streaming
      When the worker is asked to restart
      Then 16 tokens arrive, all of them and in order
      And the stream is complete
      And the worker becomes ready again

  Rule: What makes no sense is refused with the state that it is in

    Scenario: Starting what runs
      Given hive is serving
      When the worker is asked to start
      Then it is refused with 409 CONFLICT
      And the answer names "READY"

  Rule: The engine's own words can be read as they come

    Scenario: Following the log
      Given an engine that logs all the time
      And hive is serving
      And the operator follows the worker's log
      When the operator presses Ctrl+C
      Then following ends with 130

    Scenario: New lines, and new starts
      Given an engine that logs all the time
      And hive is serving
      And the operator follows the worker's log
      When the engine crashes with a segmentation fault
      Then the operator sees the engine's next start
      And the new line is shown at once
