@double
Feature: The audit log
  Afterwards somebody asks who did it. The answer must be there, and nobody may have changed it.

  Rule: It says who did what, and what came of it

    @R209
    Scenario: Somebody restarts a worker
      Given a key "ann" for inference and admin
      And a key "bob" for inference and admin
      And hive is serving
      When "ann" posts to "/hive/v1/workers/llama-0/restart"
      Then the audit log says that "ann" did "worker.restart", with 202
      And it is about "llama-0", and names the request
      And the audit log says that hive did "worker.ended", with term
      And its detail signal is "SIGTERM"
      And its detail reason is "asked"
      When "bob" posts to "/hive/v1/workers/llama-9/restart"
      Then the audit log says that "bob" did "worker.restart", with 404 NOT_FOUND

    Scenario: hive does something by itself
      Given hive is serving
      And hive has noted what the engine uses
      When the worker's first process is killed
      Then the audit log says that hive did "worker.exited", with signal
      And its detail pid is that of the process that was killed
      And the audit log says that hive did "worker.restart_planned", with ok
      And its detail reason is "restart policy"

    @R076
    Scenario: A window, and nothing of what was said in it
      Given a key "ann" for inference
      And a key "ops" for admin
      And hive is serving a model with windows
      And "ann" has a session that is frozen as "monday"
      Then the audit log says that "ann" did "window.freeze", with 201
      And it is about "monday", and names the request
      And the audit log says that "ann" did "session.create", with 201
      And the audit log holds neither keys, nor salts, nor what was said

  Rule: Who changes it is found out

    Scenario: A record is changed, while hive runs
      Given hive is serving
      When a client sends "POST" to "/hive/v1/workers/llama-0/stop"
      Then the audit log says that "local" did "worker.stop", with 202
      And the audit log is whole
      When somebody makes a "worker.start" of that record
      Then the audit log is found to be changed at that record
      And the log has a line "audit log" with the state "damaged" after the next record

  Rule: Nothing is lost when hive is

    Scenario: hive is killed, and started again
      Given hive is serving
      When hive is killed
      Then the audit log is whole
      When hive is started again
      Then the audit log says that hive did "daemon.vanished", with its stop is not recorded
      And the audit log is whole

  Rule: A full disk stops no request

    Scenario: There is no room for a while
      Given a disk that can be full
      And hive is serving
      When there is no room for the audit log
      And a client sends "DELETE" to "/hive/v1/requests/nobodys"
      Then the log has a line "audit log" with the state "failing"
      And a client can chat with "llama"
      When there is room again
      Then the audit log says that hive did "chain.gap", with No space left on device
      And the audit log says that "local" did "request.cancel", with 404 NOT_FOUND
      And the audit log is whole
