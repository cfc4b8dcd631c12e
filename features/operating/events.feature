@double
Feature: Events
  Dashboards and scripts want to know that something happened, when it happens.
  The stream of events tells it in order, and a watcher who was cut off has missed nothing.

  Rule: What happens is told as it happens, in order

    Scenario: A crash and the way back
      Given an engine that behaves
      And hive is serving
      And the operator watches the events
      When the worker's first process is killed
      Then the events tell the worker's crash and its way back, in order
      And the events follow without a gap

  Rule: Who comes back is told what was missed

    Scenario: The connection was cut
      Given an engine that behaves
      And hive is serving
      And the operator watched, and was cut off
      When the operator comes back with the id of the last event seen
      Then the events follow without a gap

    Scenario: Hive itself was restarted in between
      Given hive is serving
      When the operator comes back with an id from an earlier life of hive
      Then everything that is still known is told from the beginning

  Rule: It ends when hive ends

    Scenario: Hive stops
      Given hive is serving
      And the operator watches the events
      When hive is asked to stop
      Then the stream of events ends
      And hive ends within 3 seconds with exit code 0
