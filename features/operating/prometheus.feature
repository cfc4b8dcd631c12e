@double
Feature: Alerts in the operator's own Prometheus
  Operators have a Prometheus already: hive brings rules for it, and each alert leads to what is to be
  done. deploy/prometheus has both, as they are used here.

  Rule: What needs an operator is an alert, and it is over when it is repaired

    Scenario: A worker crashes for good
      Given a key "prometheus" for metrics
      And a key "operator" for admin and inference
      And the setting restarts.starts is 0
      And hive is serving
      And the operator's Prometheus scrapes hive with the key "prometheus", and has hive's rules
      When the engine crashes with a segmentation fault
      Then the alert HiveWorkerFailed fires for the worker
      And it is critical, and names an entry of the runbooks
      When the operator runs "worker start llama-0 --wait 10"
      Then the command ends with 0
      And the alert HiveWorkerFailed is over

  Rule: Nobody is called for what is as it should be

    Scenario: hive serves
      Given a key "prometheus" for metrics
      And a key "operator" for admin and inference
      And hive is serving
      And the operator's Prometheus scrapes hive with the key "prometheus", and has hive's rules
      When a client asks for 7 chats in turn
      Then no alert fires or is about to
