@double
Feature: Redaction
  Keys, prompts, salts, paths and hosts pass through hive all day. What it tells of its work is read
  by others: in logs, metrics, events, the audit log, alerts, and by agents.

  Rule: A secret is told to nobody but whose it is

    # In every input one of its own is planted, and each is looked for in every output. Where one may
    # appear after all, and why, is a table: MAY in steps/redaction.py.
    @R076 @R113 @R115
    Scenario: Secrets in every input are in no output
      Given secrets are planted in every input
      And hive is serving with everything planted
      When everything of hive is used with everything planted
      Then no secret is found where it does not belong
      And every code in the log can be explained, at the level that the code has
      And nothing is told twice of one request

    # Who looks must be able to find.
    Scenario: The same search finds what a hive without redaction tells
      Given secrets are planted in every input
      And a hive whose redaction does nothing is serving with everything planted
      When its HTTP API is used with everything planted
      Then secrets are found in the log, the events, a worker's log and answers

  Rule: What does not start tells no more

    @R076
    Scenario: The database's password, and where it is
      Given secrets are planted in every input
      And the catalogue is at an address that nobody has
      When hive is started and ends by itself
      Then it ends with exit code 1
      And its last line is the error STORE_UNREACHABLE, for programs to read
      And what it printed has no secret in it
