@double
Feature: Stopping
  Hive is stopped for every update, with clients in the middle of their answers.
  They get their time, nobody waits for ever, and nothing is left running.

  Rule: Hive stops cleanly when it is asked to

    @R048 @R053 @R060 @R148
    Scenario Outline: Hive is <how>
      Given an engine that runs as three processes
      And hive is serving
      When hive is <how>
      Then hive ends with exit code 0
      And every process of the engine is gone
      And its sockets and temporary files are gone

      Examples:
        | how           |
        | asked to stop |
        | interrupted   |

    Scenario: Hive is asked to stop while a model is loading
      Given an engine that never finishes loading
      And hive has just started
      When hive is asked to stop
      Then hive ends within 5 seconds with exit code 0

  Rule: A running request may finish, for a while

    Scenario: It finishes in time
      Given an engine that takes 20 ms for each token
      And hive is serving
      And a chat is streaming
      When hive is asked to stop
      Then 16 tokens arrive, all of them and in order
      And the stream is complete
      And hive ends with exit code 0

    @R040 @R058
    Scenario: New requests are refused meanwhile
      Given an engine that generates for a minute
      And hive is serving
      And a chat is streaming
      And hive waits for the running requests
      When a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "draining"
      And it is told when to come back
      And the stream goes on

    Scenario: It does not finish in time
      Given the setting server.drain_s is 0.5
      And an engine that generates for a minute
      And hive is serving
      And a chat is streaming
      When hive is asked to stop
      Then the stream ends with the error SERVICE_UNAVAILABLE
      And the stream has no end mark
      And hive ends within 3 seconds with exit code 0

    Scenario: The operator asks a second time
      Given the setting server.drain_s is 60
      And an engine that generates for a minute
      And hive is serving
      And a chat is streaming
      And hive waits for the running requests
      When hive is asked to stop a second time
      Then the stream ends with the error SERVICE_UNAVAILABLE
      And hive ends within 3 seconds with exit code 0

  Rule: An engine that does not want to end is ended

    @R048 @R051
    Scenario: It ignores being asked
      Given the setting timeouts.cleanup_s is 0.3
      And an engine that ignores being asked to end
      And hive is serving
      When hive is asked to stop
      Then hive ends within 3 seconds with exit code 0
      And every process of the engine is gone
