@double
Feature: Sessions
  A conversation has a cache of its own in the engine, and nobody else may profit from it or guess
  what is in it. A client says which conversation a request belongs to; hive knows the rest.

  Rule: A session is one conversation of one key

    @R083
    Scenario: Nobody has made it
      Given hive is serving a model with windows
      When a client asks in the session "nobody"
      Then it is refused with 404 SESSION_NOT_FOUND
      And its number is CWM-2001
      And the engine was not asked

    @R080
    Scenario: That is no session's id
      Given hive is serving a model with windows
      When a client asks in the session "../etc"
      Then it is refused with 400 INVALID_SESSION_ID
      And its number is CWM-1001

    @R076
    Scenario: Another key's
      Given a key "ann" for inference
      And a key "bob" for inference
      And a key "operator" for admin
      And hive is serving a model with windows
      And "ann" has a session in which something was answered
      When "bob" asks in that session
      Then it is refused with 404 SESSION_NOT_FOUND

    Scenario: Every request of it gets its salt
      Given hive is serving a model with windows
      And a session in which something was answered
      When a client goes on in the session
      Then the engine found what it had computed for the session
      But the engine finds nothing of it for a request without the session

    @R082
    Scenario: A caller brings a salt of its own
      Given hive is serving a model with windows
      And a session
      When a client asks in the session with a cache_salt of its own
      Then it is refused with 400 INVALID_PARAMETER
      And its number is CWM-1003
      And the engine was not asked

    @R082
    Scenario: An endpoint without a conversation
      Given hive is serving a model with windows
      And a session
      When a client asks for embeddings in the session
      Then it is refused with 400 INVALID_PARAMETER

  Rule: What was said last is what can be frozen

    Scenario Outline: A <kind> is recorded as its client will send it back
      Given hive is serving a model with windows
      And a session
      When a client has a <kind> answered in the session
      Then the session's messages end with what was answered

      Examples:
        | kind                |
        | chat                |
        | streamed chat       |
        | completion          |
        | streamed completion |
        | message             |
        | streamed message    |

    Scenario: An answer that its client did not wait for is not part of the conversation
      Given an engine with windows that generates for a minute
      And hive is serving
      And a session
      And a chat is streaming in the session
      When the client leaves
      Then the session has no messages

  Rule: Who is not used goes

    Scenario: An idle session expires
      Given sessions expire after 1 second
      And hive is serving a model with windows
      And a session in which something was answered
      When the session has expired
      And a client goes on in the session
      Then it is refused with 409 SESSION_NOT_ACTIVE
