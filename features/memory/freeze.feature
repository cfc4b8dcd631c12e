@double
Feature: Freezing a session
  Frozen means: every full chunk of the conversation's cache is on disk, complete, checksummed, and
  safe from eviction. Anything that fails on the way undoes everything.

  Rule: A freeze is whole

    @R106 @R115
    Scenario: A session becomes a window
      Given hive is serving a model with windows
      And a session in which something was answered
      When a client freezes the session as "monday"
      Then the window "monday" has every full chunk of the conversation
      And each of its blocks is a hard link that fits its checksum
      And the log tells of a freeze with its session, window, blocks and duration

    @R076
    Scenario: What is frozen takes no requests
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      When a client goes on in the session
      Then it is refused with 409 SESSION_NOT_ACTIVE
      And its number is CWM-3004

    Scenario: A checkpoint leaves the session as it is
      Given hive is serving a model with windows
      And a session in which something was answered
      When a client freezes the session as "monday" and goes on with it
      Then the answer is 201
      And the session takes requests

    @R106 @R128
    Scenario: Three in ten blocks are not written at first
      Given hive is serving a model with windows
      And a session in which something was answered
      And LMCache fails to write 3 of 10 blocks
      When a client freezes the session as "monday"
      Then the window "monday" has every full chunk of the conversation

  Rule: Or it has not happened

    @R107 @R089
    Scenario: Blocks are never written
      Given hive is serving a model with windows
      And a session in which something was answered
      And LMCache writes nothing to disk any more
      When a client freezes the session as "monday", and loses patience
      Then there is no window, no folder and no block of it
      And the session takes requests

    @R094
    Scenario: LMCache is gone
      Given hive is serving a model with windows
      And a session in which something was answered
      And LMCache is down
      When a client freezes the session as "monday"
      Then it is refused with 502 KV_SERVER_UNREACHABLE
      And its number is CWM-5002
      And there is no window, no folder and no block of it

  Rule: What forbids a freeze is told in one order, before anything is done

    @R100 @R081 @R083 @R087 @R088
    Scenario Outline: <what>
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And another session in which something was answered
      When a client freezes <session> as "<name>"
      Then it is refused with <status> <code>
      And its number is <number>

      Examples:
        | what                                | session           | name    | status | code                   | number   |
        | The id is wrong, and all the rest   | no session's id   | a b     | 400    | INVALID_SESSION_ID     | CWM-1001 |
        | The name is wrong                   | nobody's session  | a b     | 400    | INVALID_WINDOW_NAME    | CWM-1002 |
        | There is no such session            | nobody's session  | monday  | 404    | SESSION_NOT_FOUND      | CWM-2001 |
        | It is frozen, and the name is taken | the first session | monday  | 409    | SESSION_ALREADY_FROZEN | CWM-3002 |
        | The name is taken                   | the session       | monday  | 409    | WINDOW_ALREADY_EXISTS  | CWM-3003 |

    @R086
    Scenario: While an answer is being generated
      Given an engine with windows that takes 20 ms for each token
      And hive is serving
      And a session
      And a chat is streaming in the session
      When a client freezes the session as "monday"
      Then it is refused with 409 INVALID_STATE_TRANSITION
      And its number is CWM-3001

    @R086
    Scenario: Two at once
      Given hive is serving a model with windows
      And a session in which something was answered
      And LMCache needs half a second for each write
      When two clients freeze the session as "monday" and as "tuesday" at once
      Then one of them has its window, and the other one a coded error

    @R091
    Scenario: The key has as many windows as it may have
      Given a key may have 1 window
      And hive is serving a model with windows
      And a session that is frozen as "monday"
      And another session in which something was answered
      When a client freezes the session as "tuesday"
      Then it is refused with 507 STORAGE_QUOTA_EXCEEDED
      And its number is CWM-4003
