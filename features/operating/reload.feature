@double
Feature: Reload
  A restart loads every model again, for minutes. What can change while hive runs does so at once; and
  whoever changes more than that is told by name, and finds everything as it was.

  Rule: What can change does so at once, and what runs goes on

    @R034
    Scenario: A key is revoked
      Given an engine that takes 20 ms for each token
      And a key "ci" for inference
      And a key "ops" for inference and admin
      And hive is serving
      And a chat is streaming
      When the key "ci" is taken out of the configuration
      And a client sends "POST" to "/hive/v1/reload"
      Then the answer is 200
      And 16 tokens arrive, all of them and in order
      When "ci" posts to "/v1/chat/completions"
      Then it is refused with 401 UNAUTHORIZED
      When "ops" posts to "/v1/chat/completions"
      Then the answer is 200
      And the audit log says that "ops" did "settings.reload", with 200

    Scenario: There is a waiting room, and a limit for it, after a SIGHUP
      Given an engine that generates for a minute
      And the model's max_concurrent is 1
      And the model's queue_depth is 0
      And the setting server.drain_s is 0
      And hive is serving
      And a chat is streaming
      When a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "slots_busy"
      When the model's queue_depth becomes 1
      And the setting timeouts.queue_s becomes 0.5
      And hive gets a SIGHUP
      Then the log has a line "settings reloaded" with the by "SIGHUP"
      When a client asks for a chat
      Then it is refused with 503 SERVICE_UNAVAILABLE
      And the reason is "queue_timeout"
      And the audit log says that a signal did "settings.reload", with ok

  Rule: Nothing is half applied

    @R226 @R227
    Scenario: One of the keys needs a restart
      Given hive is serving
      When the setting server.log_level becomes debug
      And the model's max_concurrent becomes 9
      And the operator runs "reload"
      Then the command ends with 1
      And it complains "models.llama.max_concurrent: it cannot change while hive runs; restart hive"
      And the log has a line "reload refused; nothing changed" with the code "RELOAD_REFUSED"
      And nothing below info is logged
      And the audit log says that "local" did "settings.reload", with 409 RELOAD_REFUSED
      When the model's max_concurrent becomes 64
      And a client sends "POST" to "/hive/v1/reload"
      Then the answer is 200

    @R074
    Scenario: The file is broken, or gone
      Given hive is serving
      When the configuration is broken
      And a client sends "POST" to "/hive/v1/reload"
      Then it is refused with 422 CONFIG_INVALID
      When the configuration vanishes
      And a client sends "POST" to "/hive/v1/reload"
      Then it is refused with 422 CONFIG_INVALID
      When a client asks for a chat
      Then the answer is 200

    Scenario: hive is stopping
      Given an engine that generates for a minute
      And hive is serving
      And a chat is streaming
      And hive waits for the running requests
      When the setting server.drain_s becomes 300
      And a client sends "POST" to "/hive/v1/reload"
      Then it is refused with 409 CONFLICT
      When hive is asked to stop a second time
      Then hive ends within 5 seconds with exit code 0
