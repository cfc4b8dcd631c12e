@double
Feature: Deadlines
  Every request has one deadline from its arrival. Whatever it waits for when a limit passes, it is
  told which one, at once, and the engine is made to stop.

  Rule: Each phase has its limit, and the answer names it

    @R041 @R047 @R050 @R052
    Scenario Outline: <what>
      Given an engine that <does>
      And the setting timeouts.inference_s is 0.5
      And the setting timeouts.stall_s is 0.5
      And the setting timeouts.stream_total_s is <total>
      And hive is serving
      When a client asks for a <kind>
      Then the client is told the timeout of phase <phase> after 0.5 seconds
      And the engine is idle
      And the metrics count 0 requests in flight
      And the metrics count 1 timeout in phase <phase>

      Examples:
        | what                                  | does                                   | total | kind            | phase       |
        | No answer in time                     | never comes to the first token         | 0     | chat            | inference   |
        | No first token in time                | never comes to the first token         | 0     | streamed chat   | first_token |
        | Silence in the middle of a stream     | stops after 3 tokens, but for probes   | 0     | streamed chat   | stall       |
        | A stream that does not end            | generates for a minute                 | 0.5   | streamed chat   | total       |

    @R046
    Scenario: A long stream that gets on has all the time it needs
      Given an engine that takes 20 ms for each token
      And the setting timeouts.inference_s is 0.2
      And the setting timeouts.stall_s is 0.2
      And hive is serving
      When a client asks for 30 tokens as a stream
      Then 30 tokens arrive, all of them and in order

  Rule: A client may have less patience than hive, never more

    @R046
    Scenario Outline: It gives a <kind>
      Given an engine that never comes to the first token
      And hive is serving
      When a client asks for a chat with a <kind> of half a second
      Then it is refused with 504 REQUEST_TIMEOUT
      And the answer came after 0.4 seconds, but within 1.5
      And the engine is idle

      Examples:
        | kind     |
        | timeout  |
        | deadline |

    Scenario: Its deadline is over already
      Given hive is serving
      When a client asks for a chat with a deadline in the past
      Then it is refused with 504 REQUEST_TIMEOUT
      And the engine saw 0 requests

    Scenario: It asks for more
      Given an engine that never comes to the first token
      And the setting timeouts.inference_s is 0.5
      And hive is serving
      When a client asks for a chat with a timeout of an hour
      Then it is refused with 504 INFERENCE_TIMEOUT
      And the log says "may shorten its deadline"

    @R033
    Scenario Outline: It says "<header>: <value>"
      Given hive is serving
      When a client asks for a chat with "<header>: <value>"
      Then it is refused with 400 VALIDATION_ERROR
      And it is told what to do
      And the answer names "<header>"

      Examples:
        | header             | value               |
        | X-Hive-Timeout     | soon                |
        | X-Hive-Timeout     | -1                  |
        | X-Hive-Timeout     | 0                   |
        | X-Hive-Timeout     | nan                 |
        | X-Request-Deadline | tomorrow            |
        | X-Request-Deadline | 2030-01-31T12:00:00 |
        | X-Hive-Priority    | vip                 |
