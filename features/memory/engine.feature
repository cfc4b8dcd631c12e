@engine
Feature: The real engine's memory
  The real vLLM and the real LMCache: what was computed once is not computed again, for nobody but its
  owner, and not even a restart of everything, or a kill in the middle, changes that.

  Rule: Freeze, restart everything, thaw, and go on as if nothing had happened

    @R103 @R106 @R107
    Scenario: A conversation outlives its engine, its cache and hive
      Given the real engine is serving with its cache
      And "ann" has a conversation of many chunks, and knows how it would go on
      And she has frozen it
      When hive is killed in the middle of another freeze, and started again
      Then the other window is whole, or was never there
      When she thaws hers and goes on
      Then the tokens are the same, and the engine had every full chunk in its cache
      But the engine has nothing of it for another salt
      And "bob" can neither see, thaw nor guess it

  Rule: A cache that hangs costs nobody an answer

    @R094
    Scenario: LMCache hangs while requests run
      Given the real engine is serving with its cache
      When LMCache is stopped in its tracks while requests run
      Then every request is answered within its deadline
      And LMCache and the engine are back by themselves
      And what is frozen then is whole, and thaws with every chunk

  Rule: A freeze that is cut off has not happened; what the cache promised and did not give is told

    @R103 @R107 @R172
    Scenario: hive is killed in the middle of a freeze, and then loads from its cache fail
      Given the real engine is serving with its cache
      And "ann" has a conversation of many chunks, and knows how it would go on
      And she has frozen it
      When hive is killed in the middle of another freeze, and started again with loads that fail, now and then
      Then the other window is whole, or was never there
      When she thaws hers and goes on
      Then the tokens are the same, and the engine's count tells what the cache did not give
