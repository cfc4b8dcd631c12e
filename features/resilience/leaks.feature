@double
Feature: Leaks
  What is written down before it is taken can be missed when it does not come back. A leak is an
  error with a name, a holder and a way to clear it, not a surprise at the next start.

  Rule: What a worker took and did not give back is told while it is so

    @R023
    Scenario: Another program holds on to it
      Given the setting timeouts.cleanup_s is 0.2
      And an engine that ignores being asked to end
      And it uses shared memory
      And hive is serving
      And another program uses a part of the engine's shared memory
      When the worker is asked to stop
      Then the worker comes to rest, stopped
      And every process of the engine is gone
      And "hive leaks" names that memory and that program
      And the metrics count 1 leak of shared_memory
      And the log has a line "leak" with the kind "shared_memory"
      And the other program is not touched

    @R075 @R154
    Scenario: The worker serves on meanwhile
      Given the setting timeouts.cleanup_s is 0.2
      And an engine that ignores being asked to end
      And it uses shared memory
      And hive is serving
      And another program uses a part of the engine's shared memory
      When the worker is asked to restart
      Then the worker becomes ready again
      And "hive leaks" names that memory and that program

    @R023 @R145
    Scenario: It lets go
      Given the setting timeouts.cleanup_s is 0.2
      And an engine that ignores being asked to end
      And it uses shared memory
      And hive is serving
      And another program uses a part of the engine's shared memory
      And the worker was stopped and looked at
      When that program ends
      Then there are no leaks
      And its shared memory is gone
      And the log has a line "leak cleared" with the kind "shared_memory"

    Scenario: Programs can ask, too
      Given hive is serving
      When a client gets "/hive/v1/leaks"
      Then the answer is 200
      And the answer names "leaks"
      And the metrics count 0 leaks of process

  Rule: hive does not end as if all were well

    @R022 @R061
    Scenario: Something is leaked as it stops
      Given the setting timeouts.cleanup_s is 0.2
      And an engine that ignores being asked to end
      And it uses shared memory
      And hive is serving
      And another program uses a part of the engine's shared memory
      When hive is asked to stop
      Then hive ends within 5 seconds with exit code 1
      And the last line of the log is the error RESOURCE_LEAK_DETECTED
      And the error counts 0 leaked processes, and says how to clean up

    @R022 @R060
    Scenario: It was given back in time
      Given the setting timeouts.cleanup_s is 0.2
      And an engine that ignores being asked to end
      And it uses shared memory
      And hive is serving
      And another program uses a part of the engine's shared memory
      And the worker was stopped and looked at
      And that program has ended
      When hive is asked to stop
      Then hive ends within 5 seconds with exit code 0
      And its shared memory is gone

    @R143 @R145
    Scenario: The next hive knows of it, and clears it
      Given the setting timeouts.cleanup_s is 0.2
      And an engine that ignores being asked to end
      And it uses shared memory
      And hive is serving
      And another program uses a part of the engine's shared memory
      And hive has stopped
      And that program has ended
      When hive is started again
      Then the model is ready
      And its shared memory is gone
      And there are no leaks
