@double
Feature: Alerts to a webhook
  Whoever is on call is told by an Alertmanager. What was queued for it arrives, once, whatever
  becomes of the webhook, the disk or hive itself in between.

  Rule: What escalates is sent, and that it is over, too

    @R193 @R194 @R209
    Scenario: A breaker opens, and closes again
      Given a webhook that takes alerts with a token
      And the setting breaker.cooldown_s is 1
      And the engine refuses every request with 500
      And hive is serving
      When a client asks for 5 chats in turn
      Then the webhook gets "HiveBreakerOpen" of the worker, with what to do
      And it holds nothing that was asked, no key, no path and no host
      When the engine is well again
      And the cooldown is over
      And a client asks for a chat
      Then the webhook gets the end of everything that it got
      And no alert waits to be sent

    Scenario: An Alertmanager knows what it is told
      Given an Alertmanager that gets everything twice
      And the setting breaker.cooldown_s is 1
      And the engine refuses every request with 500
      And hive is serving
      When a client asks for 5 chats in turn
      Then the Alertmanager has "HiveBreakerOpen" once
      When the engine is well again
      And the cooldown is over
      And a client asks for a chat
      Then the Alertmanager has nothing any more

  Rule: Nothing is lost while nobody takes it

    @R235 @R249
    Scenario: The webhook is down, and hive is killed
      Given a webhook that takes alerts with a token
      And the webhook is down
      And the engine refuses every request with 500
      And hive is serving
      When a client asks for 5 chats in turn
      Then 2 alerts wait to be sent, and the operator is shown why
      When hive is killed
      And hive is started again
      And the webhook is there again
      Then the webhook gets each of them once, and that they are over
      And no alert waits to be sent

    @R235 @R249
    Scenario: hive cannot start any more
      Given a webhook that takes alerts with a token
      And the webhook is down
      And the engine refuses every request with 500
      And hive is serving
      When a client asks for 5 chats in turn
      Then 2 alerts wait to be sent, and the operator is shown why
      When hive is killed
      And the webhook is there again
      And hive is started again, and its model's engine is gone
      Then the webhook gets each of them once, and is told that it is still so

    @R235 @R249
    Scenario: hive is killed again and again
      Given a webhook that takes alerts with a token
      And 2 models whose engines fail
      When hive is killed 8 times: while alerts wait, arrive, and were just taken
      And hive is started again, and nothing fails any more
      Then every alert that was queued has arrived
      And each has arrived once, but for those that were taken at the moment of a kill
      And those that came twice are the same to the byte
      And the webhook was told the end of all of them

    Scenario: The webhook refuses hive
      Given a webhook that takes alerts with another token
      And the engine refuses every request with 500
      And hive is serving
      When a client asks for 5 chats in turn
      Then the webhook escalates as "credentials_refused", level critical
      And the log has a line "alert tried" with the outcome "failed"
      When the webhook takes that token, too
      Then the webhook gets "HiveBreakerOpen" of the worker, with what to do
      And no alert waits to be sent

  Rule: Neither the disk nor the webhook holds anything up

    @R249
    Scenario: The disk is full
      Given a webhook that takes alerts with a token
      And the disk of the outbox is full
      And the engine refuses every request with 500
      And hive is serving
      When a client asks for 5 chats in turn
      Then the webhook gets "HiveBreakerOpen" of the worker, with what to do
      And the operator is told that alerts cannot be written down
      And hive stops within 10 seconds, whatever the disk does

    Scenario: The disk hangs
      Given a webhook that takes alerts with a token
      And the disk of the outbox hangs
      And the engine refuses every request with 500
      And hive is serving
      When a client asks for 5 chats in turn
      Then the webhook gets "HiveBreakerOpen" of the worker, with what to do
      And the operator is told that alerts cannot be written down
      And hive stops within 10 seconds, whatever the disk does
