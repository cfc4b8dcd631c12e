@double
Feature: Request ids
  One name for a request, from the client's log to the engine's, is what makes a failure findable.
  The client may choose it; hive makes one where there is none that can be used.

  Rule: A usable id is kept everywhere

    Scenario: The client names its request
      Given hive is serving
      When a client asks for a chat with the request id "job-7.retry_1"
      Then the answer has the request id "job-7.retry_1"
      And the engine was told the request id "job-7.retry_1"

    Scenario: The client does not
      Given hive is serving
      When a client asks for a chat
      Then the answer has a request id that hive made
      And the engine was told the same request id

    Scenario Outline: <why>
      Given hive is serving
      When a client asks for a chat with the request id "<id>"
      Then the answer has a request id that hive made
      And the engine was told the same request id

      Examples:
        | why                            | id        |
        | It has a character too strange | a/b       |
        | It has a space in it           | two words |

  Rule: Two requests in flight never share one

    Scenario: The same id while the first is still running
      Given an engine that generates for a minute
      And hive is serving
      And a chat is streaming with the request id "once"
      When a client asks for a chat with the request id "once"
      Then it is refused with 409 CONFLICT
      And it is told what to do
      And the stream goes on

    Scenario: The same id when the first is over
      Given hive is serving
      When a client asks for a chat with the request id "once"
      And a client asks for a chat with the request id "once"
      Then the answer is 200

  Rule: What belongs to hive ends at hive

    @R076
    Scenario: The client's credentials
      Given a key "ci" for inference
      And a key "ops" for admin
      And hive is serving
      When "ci" asks for a chat with X-Api-Key
      Then the answer is 200
      And the engine was not told "X-Api-Key"
