@double
Feature: Bad requests
  Hive must know which model a request is for; everything else in it is the engine's business.
  What it cannot use it refuses itself, at once, saying what is wrong and repeating nothing.

  Rule: A request that cannot be understood is refused before any work is done

    @R027 @R029 @R032 @R033 @R074 @R076
    Scenario Outline: A client sends <what>
      Given hive is serving
      When a client sends <what> in place of a request
      Then it is refused with 400 VALIDATION_ERROR
      And the answer names "<named>"
      And it is told what to do
      And it is not told to come back
      And the answer repeats nothing of what was sent
      And the engine saw 0 requests

      Examples:
        | what                              | named                      |
        | nothing                           | no body                    |
        | something that is not JSON        | not valid JSON             |
        | a list instead of an object       | must be a JSON object      |
        | an object without a model         | 'model' is missing         |
        | a number as the model             | 'model' must be a string   |
        | an empty name as the model        | 'model' must not be empty  |
        | a number that JSON does not have  | not valid JSON             |
        | something nested 100000 deep      | nested too deeply          |
        | two documents in one              | not valid JSON             |

    @R033
    Scenario: A recording for no model
      Given hive is serving
      When a client sends a recording without a model
      Then it is refused with 400 VALIDATION_ERROR
      And the answer names "llama"

  Rule: A model is never guessed or replaced

    @R036
    Scenario: The model is not served here
      Given a second model, "qwen", with an engine that behaves
      And hive is serving
      When a client asks "gpt-4" for a chat
      Then it is refused with 404 MODEL_NOT_FOUND
      And the answer names "llama"
      And the answer names "qwen"
      And the engine saw 0 requests

    Scenario: Which models there are
      Given a second model, "qwen", with an engine that never finishes loading
      And hive has just started
      When a client gets "/v1/models"
      Then the answer is 200
      And the answer names "llama"
      And the answer names "qwen"

  Rule: Paths and methods are refused in the same words as everything else

    @R036 @R042
    Scenario Outline: A client sends <method> to <path>
      Given hive is serving
      When a client sends "<method>" to "<path>"
      Then it is refused with <status> <code>
      And it is told what to do

      Examples:
        | method | path                 | status | code       |
        | GET    | /nowhere             | 404    | NOT_FOUND  |
        | GET    | /v1/models/gpt-4     | 404    | MODEL_NOT_FOUND |
        | DELETE | /livez               | 405    | HTTP_ERROR |
        | GET    | /v1/chat/completions | 405    | HTTP_ERROR |
