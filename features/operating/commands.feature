@double
Feature: Commands
  At three in the morning an operator asks: what runs, what is wrong, what can I do?
  Every command is a client of the running daemon, and its exit code says how it went.

  Rule: The state of the daemon is one command away

    @R060
    Scenario Outline: The operator runs "<command>"
      Given an engine that says hello on its way up
      And hive is serving
      When the operator runs "<command>"
      Then the command ends with 0
      And it prints "<printed>"

      Examples:
        | command                  | printed               |
        | status                   | ready                 |
        | worker list              | llama-0               |
        | worker show llama-0      | state closed          |
        | worker logs llama-0      | hello from the engine |
        | health                   | ok                    |
        | health --verbose         | llama-0               |
        | test-connection --engine | ok                    |
        | explain WORKER_CRASHED   | 502                   |

    Scenario Outline: The same for programs: "<command>"
      Given hive is serving
      When the operator runs "<command> --json"
      Then the command ends with 0
      And for programs it prints <key> "<value>"

      Examples:
        | command                  | key               | value          |
        | status                   | ready             | True           |
        | worker list              | workers.0.state   | READY          |
        | worker show llama-0      | id                | llama-0        |
        | health                   | status            | ok             |
        | test-connection --engine | status            | ok             |
        | explain CWM-2001         | code              | SESSION_NOT_FOUND |

  Rule: The exit code says how it went

    @R061 @R062 @R064
    Scenario Outline: Exit code <code>
      Given hive is serving
      When the operator runs "<command>"
      Then the command ends with <code>
      And it complains "<complaint>"

      Examples:
        | code | command                         | complaint          |
        | 1    | worker show nobody-0            | no such worker     |
        | 1    | explain WORKER_CRASHES          | WORKER_CRASHED     |
        | 1    | worker start llama-0            | CONFLICT           |
        | 2    | worker show                     | Missing argument   |
        | 2    | nonsense                        | No such command    |
        | 2    | test-connection                 | --engine           |

    @R121
    Scenario: Nothing can serve
      Given an engine that never finishes loading
      And hive has just started
      When the operator runs "health"
      Then the command ends with 1
      And it prints "down"

    @R064
    Scenario: There is no daemon
      Given hive is serving
      And hive has stopped
      When the operator runs "status"
      Then the command ends with 255
      And it complains "DAEMON_UNREACHABLE"

    @R062
    Scenario: The daemon does not answer
      Given hive is serving
      And hive does not answer any more
      When the operator runs "status --timeout 0.3"
      Then the command ends with 124

    @R062
    Scenario: What was asked for takes too long
      Given an engine that takes a second to load
      And hive is serving
      When the operator runs "worker restart llama-0 --wait 0.3"
      Then the command ends with 124
