@double
Feature: Circuit breaker
  A worker that fails again and again is not asked for a while: its clients are told at once instead
  of waiting for the next failure.

  Background:
    Given the setting breaker.cooldown_s is 1

  Rule: Five faults in a row open it

    @R006 @R007 @R011 @R012
    Scenario: It opens
      Given the engine refuses every request with 500
      And hive is serving
      When a client asks for 5 chats in turn
      And a client asks for a chat
      Then it is refused with 503 CIRCUIT_BREAKER_OPEN
      And it is told when to come back
      And the error tells 5 failures of 5, and a cooldown of 1 second
      And the engine saw 5 requests
      And the log has a line "breaker moved" with the level "error"
      And the metrics say that the breaker is open

    @R006
    Scenario: A success in between begins the count anew
      Given the engine refuses every request with 500
      And hive is serving
      When a client asks for 4 chats in turn
      And the engine is well again
      And a client asks for a chat
      And the engine refuses everything with 500 again
      And a client asks for 4 chats in turn
      Then the metrics say that the breaker is closed

  Rule: What is no fault of the worker does not count

    Scenario Outline: <what>
      Given the engine refuses every request with <status>
      And hive is serving
      When a client asks for 8 chats in turn
      Then the answer is <passed on>
      And the metrics say that the breaker is closed

      Examples:
        | what                          | status | passed on |
        | The client's own fault        | 400    | 400       |
        | The engine is full            | 429    | 429       |
        | The engine asks for patience  | 503    | 503       |

    Scenario: The engine's own hint is passed on
      Given the engine refuses every request with 503 for 7 seconds
      And hive is serving
      When a client asks for a chat
      Then the answer is 503
      And the answer has the header "Retry-After" with "7"

  Rule: After the cooldown one request tries

    @R008 @R009 @R010
    Scenario: It goes well
      Given the engine refuses every request with 500
      And hive is serving
      And the breaker has opened
      And the engine is well again
      When the cooldown is over
      And 6 clients ask for a slow chat at once
      Then one of them is answered, and the others are refused with CIRCUIT_BREAKER_OPEN
      And the metrics say that the breaker is closed

    @R010
    Scenario: It fails again
      Given the engine refuses every request with 500
      And hive is serving
      And the breaker has opened
      When the cooldown is over
      And a client asks for a chat
      Then the answer is 500
      And the metrics say that the breaker is open

    Scenario: Another process is another start
      Given the engine refuses every request with 500
      And hive is serving
      And the breaker has opened
      When the operator restarts the worker
      Then the metrics say that the breaker is closed
