@double
Feature: Escalation
  One failed request is its client's business. What fails again and again, or will not come back by
  itself, is a person's: who is told once, with what to do, and once more when it is over.

  Rule: A person is told once, and what to do

    @R192 @R193 @R194 @R205 @R209 @R251 @R263
    Scenario: A breaker opens, and closes again
      Given the setting breaker.cooldown_s is 1
      And the engine refuses every request with 500
      And hive is serving
      And the operator watches the events
      Then the service level is full
      When a client asks for 5 chats in turn
      Then the worker escalates as "breaker_open", level high
      And the service level is down
      And the service escalates as "service_degraded", level critical
      And the operator is shown both, the worst first, each with what to do
      And the log has a line "escalated" with the severity "critical"
      And the log has a line "escalated" with the level "warning"
      And the events tell of each once
      And the metrics count 1 escalation of level high, and 1 of level critical
      When the engine is well again
      And the cooldown is over
      And a client asks for a chat
      Then nothing is escalated any more
      And the service level is full
      And the events tell that each is over
      And the log has a line "escalation resolved" with the rule "breaker_open"

    @R189 @R190
    Scenario: The same operation fails again and again
      Given the setting breaker.failures is 100
      And the engine refuses every request with 500
      And hive is serving
      When a client asks for 5 chats in turn
      Then nothing is escalated
      When a client asks for 17 chats in turn
      Then the model escalates as "repeated_failures", level high
      And the model escalates as "error_rate", level high
      And the log tells of each once

    @R186 @R207 @R208
    Scenario: A worker is given up
      Given the setting restarts.starts is 1
      And hive is serving
      When the engine crashes, whenever it is started
      Then the worker escalates as "worker_failed", level critical
      And the log has a line "escalated" with the level "error"
      And "hive alerts" ends with exit code 1

  Rule: What clients do wrong is nobody's alarm

    @R114 @R166 @R187
    Scenario Outline: <what>
      Given the engine refuses every request with <status>
      And hive is serving
      When a client asks for 25 chats in turn
      Then nothing is escalated

      Examples:
        | what                         | status |
        | Requests that are not valid  | 400    |
        | More than the engine takes   | 429    |

    @R187
    Scenario: A wrong key is told by the number of its requests
      Given hive is serving with a key for clients and one for operators
      When somebody asks 20 times with a key that is none
      Then nothing is escalated
      When somebody asks once more with a key that is none
      Then the clients escalate as "clients_refused", level medium
      And a key for clients may not see it
