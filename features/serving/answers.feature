@double
Feature: Answers
  What a model can do is the engine's business, and changes with each of its versions.
  Hive finds the right worker, and then stays out of the way.

  Rule: Whatever the engine answers reaches the client unchanged

    Scenario Outline: A client asks for a <kind>
      Given hive is serving
      When a client asks for a <kind>
      Then the answer to the <kind> is what the engine itself answers

      Examples:
        | kind         |
        | chat         |
        | completion   |
        | embedding    |
        | message      |
        | response     |
        | score        |
        | reranking    |
        | tokenization |

    Scenario: A recording is written down
      Given hive is serving
      When a client sends a recording to be written down by "llama"
      Then the answer says how long the recording is

  Rule: A stored response is asked for where it was made

    Scenario: A response by its id
      Given hive is serving
      And a second model, "qwen", with an engine that behaves
      When a client asks for a response
      And a client asks for that response again by its id
      Then the same response is in the answer

    Scenario: A response that nobody made
      Given hive is serving
      When a client gets "/v1/responses/resp_0123"
      Then it is refused with 404 NOT_FOUND

  Rule: An engine's own errors are passed on as they are

   
    Scenario Outline: The engine answers <status>
      Given the engine refuses every request with <status>
      And hive is serving
      When a client asks for a chat
      Then the answer is <status>
      And the answer names "The engine double was told to answer so."
      And the worker stays ready

      Examples:
        | status |
        | 400    |
        | 429    |
        | 500    |
        | 503    |

   
    Scenario: The engine says when to come back
      Given the engine refuses every request with 429 for 7 seconds
      And hive is serving
      When a client asks for a chat
      Then the answer is 429
      And the answer has the header "Retry-After" with "7"

    Scenario: The engine refuses before it has read everything
      Given an engine that answers before it has read the request
      And hive is serving
      When a client asks for a chat
      Then the answer is 413
      And the worker stays ready

    Scenario: What the model cannot do, its engine says
      Given hive is serving
      When a client sends "POST" to "/v1/images/generations"
      Then it is refused with 400 VALIDATION_ERROR
