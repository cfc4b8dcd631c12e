@double
Feature: LMCache beside the engines
  The KV cache is a process of its own, and it may die, hang or be slow. Requests are answered all the
  same, nothing is called frozen that is not, and the cache comes back by itself.

  Rule: The cache is a worker like the engines

    Scenario: It is started before them and listed with them
      Given hive is serving a model with windows
      When the operator runs "worker list"
      Then it prints "lmcache"

    @R121
    Scenario: Its health is told
      Given hive is serving a model with windows
      When the operator runs "health --verbose"
      Then the command ends with 0
      And it prints "lmcache"

    @R123
    Scenario: It is tested alone
      Given hive is serving a model with windows
      And LMCache does not answer its health check
      When the operator runs "test-connection --lmcache"
      Then the command ends with 1
      And it complains "KV cache server"

  Rule: Its end is no client's end

    Scenario: It is killed while requests run
      Given an engine with windows that takes 20 ms for each token
      And hive is serving
      And 3 chats are streaming in sessions
      When LMCache is killed
      Then every stream is complete
      And LMCache is ready again by itself

    @R094
    Scenario: Until the engine was restarted, too, nothing is frozen
      Given an engine with windows that generates for a minute
      And hive is serving
      And a session in which something was answered
      And a chat is streaming
      And LMCache is killed, and ready again
      When a client freezes the session as "monday"
      Then it is refused with 502 KV_SERVER_UNREACHABLE
      And the reason is "cache_lost"
      When the client leaves
      Then the engine is restarted by itself
      And a client can freeze the session as "monday"

    Scenario: It hangs
      Given hive is serving a model with windows
      And a session in which something was answered
      When LMCache is stopped in its tracks
      Then a client is answered in the session within 10 seconds
      And LMCache is replaced by itself
