@double
Feature: Logs
  When something has gone wrong, the log is all that is left of it.
  Each line is a whole record, each request has one, and none repeats what people asked.

  Rule: A request has one line, which its id finds

    @R059
    Scenario: A good one
      Given hive is serving
      When a client asks for a chat with the request id "good-1"
      Then the log has one access line for "good-1", with 200
      And every line of the log is a whole record

    @R059 @R113
    Scenario: A refused one is no error of ours
      Given an engine that never finishes loading
      And hive has just started
      When a client asks for a chat with the request id "early-1"
      Then the log has one access line for "early-1", with 503
      And that line is a warning with the code SERVICE_UNAVAILABLE

    Scenario: Probes and scrapes would drown everything else
      Given hive is serving
      When a client gets "/metrics"
      Then the answer is 200
      And probes and scrapes leave no access lines

  Rule: What people ask is nobody else's business

    @R076
    Scenario: A chat
      Given an engine that logs what it is asked
      And hive is serving
      When a client asks for a chat about something secret
      Then the answer is 200
      And the log shows nothing of what was asked

  Rule: A worker's life can be read

   
    Scenario: A crash
      Given an engine that behaves
      And hive is serving
      When the worker's first process is killed
      Then the log has a line "engine exited" with the status "signal SIGKILL"
      And the log has a line "worker restarts" with the worker "llama-0"

    @R051
    Scenario: An engine that had to be killed
      Given the setting timeouts.cleanup_s is 0.3
      And an engine that ignores being asked to end
      And hive is serving
      When hive is asked to stop
      Then hive ends with exit code 0
      And the log has a line "process tree ended" with the how "kill"
