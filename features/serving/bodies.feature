@double
Feature: Request bodies
  Images and recordings make bodies large, and slow clients keep them open.
  Each body has a size and a time, and all together have a bound, so that nobody can fill hive.

  Rule: A body has a size

    Scenario: It says that it will be too large
      Given the setting server.max_body_mib is 1
      And hive is serving
      When a client sends a body of 2 MiB
      Then it is refused with 413 PAYLOAD_TOO_LARGE
      And the engine saw 0 requests

    Scenario: It does not say, and becomes too large
      Given the setting server.max_body_mib is 1
      And hive is serving
      When a client sends 2 MiB without saying how much it will be
      Then the client is answered with 413 PAYLOAD_TOO_LARGE
      And the engine saw 0 requests

  Rule: A body has a time

    Scenario: It does not arrive
      Given the setting server.body_s is 0.3
      And hive is serving
      When a client sends half of a body and then nothing more
      Then the client is answered with 504 REQUEST_TIMEOUT
      And the engine saw 0 requests

  Rule: All bodies together have a bound

    @R040 @R058
    Scenario: Many unfinished bodies
      Given the setting server.max_buffered_mib is 1
      And hive is serving
      And 2 clients that have sent half a megabyte each and are not done
      When a client sends a body of 2 MiB
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "bodies_full"
      And it is told when to come back

  Rule: A recording is sent on as it comes
    Its form says early which model it is for, so that hive need not hold the rest.

    Scenario: It is larger than all that hive may hold
      Given the setting server.max_buffered_mib is 1
      And hive is serving
      When a client sends a recording of 8 MiB for "llama", the model first
      Then the answer says that the recording is 8 MiB long

    Scenario: The model is told behind it
      Given the setting server.max_buffered_mib is 1
      And hive is serving
      When a client sends a recording of 8 MiB for "llama", the model last
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "bodies_full"

  Rule: A body is plain

    Scenario: A compressed body
      Given hive is serving
      When a client sends a compressed body
      Then it is refused with 415 HTTP_ERROR
      And the engine saw 0 requests
