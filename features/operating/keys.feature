@double
Feature: API keys
  A model that anybody on the network can use is used by anybody.
  With one key configured, everything but "are you there?" needs one, and a key opens only its doors.

  Rule: Without a valid key there is no answer

    @R034
    Scenario Outline: <what>
      Given a key "ci" for inference
      And a key "ops" for admin
      And hive is serving
      When somebody asks for a chat with the authorization "<sent>"
      Then it is refused with 401 UNAUTHORIZED
      And the answer has the header "WWW-Authenticate" with "Bearer"
      And it is not told to come back
      And the engine saw 0 requests

      Examples:
        | what                | sent                                |
        | A wrong key         | Bearer hive_nobody_0123456789abcdef |
        | Half of a header    | Bearer                              |
        | Another kind of one | Basic Y2k6c2VjcmV0                  |

    @R034
    Scenario Outline: No key, for <path>
      Given a key "ops" for admin
      And hive is serving
      When somebody gets "<path>"
      Then the answer is <status>

      Examples:
        | path              | status |
        | /v1/models        | 401    |
        | /metrics          | 401    |
        | /hive/v1/status   | 401    |
        | /hive/v1/workers  | 401    |
        | /livez            | 200    |
        | /readyz           | 200    |

  Rule: A key opens what it is for

    @R035
    Scenario Outline: A key for <scope>, and <path>
      Given a key "one" for <scope>
      And a key "ops" for inference and admin
      And hive is serving
      When "one" <asks> "<path>"
      Then the answer is <status>

      Examples:
        | scope     | asks     | path                           | status |
        | inference | posts to | /v1/chat/completions           | 200    |
        | inference | gets     | /v1/models                     | 200    |
        | inference | gets     | /hive/v1/workers               | 403    |
        | inference | posts to | /hive/v1/workers/llama-0/stop  | 403    |
        | inference | gets     | /metrics                       | 403    |
        | metrics   | gets     | /metrics                       | 200    |
        | metrics   | posts to | /v1/chat/completions           | 403    |
        | admin     | gets     | /metrics                       | 200    |
        | admin     | posts to | /v1/chat/completions           | 403    |

  Rule: A key is kept secret

    @R076
    Scenario: Not in the log, not in the answer
      Given a key "ci" for inference
      And a key "ops" for admin
      And hive is serving
      When "ci" gets "/hive/v1/workers"
      Then it is refused with 403 FORBIDDEN
      And neither the log nor the answer shows the key "ci"

    Scenario: A new key
      Given an engine that behaves
      When the operator makes a key "ci" for inference
      Then the command ends with 0
      And the key is shown once, and only its hash is kept
