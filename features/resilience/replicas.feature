@double
Feature: Replicas and retries
  What nobody has answered yet can be asked again: another worker of the same model takes it at
  once. What a client has seen the first byte of is never repeated.

  Rule: The least loaded worker takes the next request

    Scenario: They share the work
      Given a model with 2 replicas that generate for a minute
      And hive is serving
      When 4 clients stream a chat
      Then each replica answers 2 of them

    Scenario: A session stays with its worker
      Given a model with windows and 2 replicas
      And hive is serving
      When a client asks for 6 chats of one session in turn
      Then one replica has answered all of them

  Rule: The end of one does not disturb the others

    @R153 @R154
    Scenario: One is killed while both answer
      Given a model with 2 replicas that generate for a minute
      And hive is serving
      And 4 clients stream a chat
      When the engine of "llama-0" is killed
      Then the streams of "llama-0" end with WORKER_CRASHED
      And the streams of "llama-1" go on

    @R001 @R005 @R039
    Scenario: What it had not begun to answer is answered by the other
      Given a model with 2 replicas that never come to the first token
      And hive is serving
      And a chat is being generated that is not streamed by one of them
      And the other replica is well again
      When the engine that has it is killed
      Then the answer is 200
      And the log has a line "request is sent again" with the attempt "2"
      And the metrics count 1 retry that ended in success

  Rule: The only worker is asked again after a pause, inside the deadline

    @R001 @R002 @R003 @R005
    Scenario: It broke the connection off, and is well then
      Given an engine that hangs up on its next 1 request
      And hive is serving
      When a client asks for a chat
      Then the answer is 200
      And the answer came after 1 seconds, but within 4
      And the log has a line "request is sent again" with the attempt "2"

    @R004 @R030
    Scenario: The next attempt would be too late
      Given an engine that hangs up on its next 9 requests
      And the setting timeouts.request_s is 2
      And the setting timeouts.queue_s is 1
      And the setting timeouts.inference_s is 1
      And the setting timeouts.cleanup_s is 0.5
      And hive is serving
      When a client asks for a chat
      Then it is refused with 503 RETRY_BACKOFF
      And it is told when to come back
      And the error names attempt, schedule and strategy

    @R044
    Scenario: What has begun is not repeated
      Given a model with 2 replicas that generate for a minute
      And hive is serving
      And 1 clients stream a chat
      When the engine that has it is killed
      Then the stream ends with the error WORKER_CRASHED
      And the metrics count no retries
