@double
Feature: Tools for agents
  `hive mcp` gives agents hive's sessions and windows as tools of the Model Context Protocol. It is a
  client of the HTTP API: it may do what the caller's key may do, and its errors have codes.

  Rule: Every tool works, whichever way an agent comes

    @R111 @R183
    Scenario Outline: An agent uses every tool there is
      Given hive is serving a model with windows
      And an agent over <way>
      When the agent has a conversation, and freezes it as "monday"
      And the agent looks at "monday", clones it as "copy", thaws "copy" and deletes it
      And the agent asks for sessions, workers, the cache, health and metrics
      Then every tool was used, and each answered live
      And the agent can read every resource

      Examples:
        | way   |
        | stdio |
        | HTTP  |

    Scenario: An agent hears how far a freeze is
      Given hive is serving a model with windows
      And an agent over stdio
      When the agent has a conversation, and freezes it as "monday"
      Then the agent has heard of its progress

  Rule: What goes wrong has a code, and says whether to try again

    @R111 @R112 @R080 @R084 @R088
    Scenario: Calls that cannot work
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And an agent over stdio
      Then these calls fail, and a workflow can read the same:
        | tool          | arguments                                       | text                                                                                       |
        | window_freeze | {"session_id": "!", "window_name": "x"}         | {"error": "CWM-1001", "message": "Invalid session ID format", "retryable": false}          |
        | window_status | {"window_name": "nope"}                         | {"error": "CWM-2002", "message": "Window not found: nope", "retryable": false}             |
        | window_status | {"window_name": ".."}                           | {"error": "CWM-1002", "message": "Invalid window name format", "retryable": false}         |
        | window_clone  | {"window_name": "monday", "new_name": "monday"} | {"error": "CWM-3003", "message": "Window name already exists: monday", "retryable": false} |
        | window_status | {"name": "monday"}                              | {"error": "CWM-1003", "message": "Invalid parameter: window_name", "retryable": false}     |
        | window_list   | {"limit": 5000}                                 | {"error": "CWM-1003", "message": "Invalid parameter: limit", "retryable": false}           |

    @R098 @R112
    Scenario: A key that asks too often is told when to ask again
      Given a key "ann" for inference
      And a key "operator" for admin
      And the key "ann" may ask 3 times a minute
      And hive is serving a model with windows
      And an agent with the key of "ann" over stdio
      When the agent chats until it may not
      Then the tool fails as "Rate limit exceeded, try again in {seconds}s" with CWM-7002

    @R169 @R181 @R212
    Scenario: hive is down
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And an agent over stdio
      And the agent has asked for its windows and for hive's health
      When hive stops
      And the agent asks for its windows
      Then it gets what it was told before, marked as such and with its age
      When the agent asks for hive's health
      Then the tool fails, and what was known last is told as such
      When the agent tries to delete "monday"
      Then the tool fails with DAEMON_UNREACHABLE

    @R172 @R262 @R213 @R219 @R171
    Scenario: A part of hive is down
      Given hive is serving a model with windows
      And an agent over stdio
      And LMCache does not answer its health check
      When the agent calls cache_stats with {}
      Then it gets the parts there are, and is told which one is missing

  Rule: An agent may do what its key may do

    @R076
    Scenario: Over HTTP everybody brings a key of their own
      Given a key "ann" for inference
      And a key "bob" for inference
      And a key "operator" for admin
      And hive is serving a model with windows
      And "ann" has a session that is frozen as "monday"
      And an agent with the key of "bob" over HTTP
      When the agent calls window_status with {"window_name": "monday"}
      Then the tool fails with {"error": "CWM-2002", "message": "Window not found: monday", "retryable": false}
      When an agent without a key comes over HTTP
      And the agent calls window_list with {}
      Then the tool fails with {"error": "UNAUTHORIZED", "message": "Authentication required: no API key was sent.", "retryable": false}

    Scenario: Only this host may come
      When the operator runs "mcp --transport http --host 0.0.0.0"
      Then the command ends with 1
      And it complains "loopback addresses only"

  Rule: It ends when it is told to

    Scenario Outline: A signal, or nobody left to answer
      When <what>
      Then hive mcp ends with 0

      Examples:
        | what                       |
        | the agent closes its input |
        | hive mcp gets SIGTERM      |
        | hive mcp gets SIGINT       |
