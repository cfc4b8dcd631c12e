@double
Feature: Crashes
  Engines die: of bugs, of memory, of the driver. An engine is a tree of processes, too, and when
  one of them dies the others may answer on as if nothing had happened.

  Rule: Whichever process dies, its clients learn it within two seconds

    @R039 @R153
    Scenario Outline: The <member> is killed while a client is reading
      Given an engine that runs as three processes
      And it takes half a second to load
      And it generates for a minute
      And hive is serving
      And a chat is streaming
      When the worker's <member> is killed
      Then the client knows within 2 seconds
      And at that moment the model is not ready
      And the stream ends with the error WORKER_CRASHED
      And the stream has no end mark
      And every process of the engine is gone
      And the worker becomes ready again

      Examples:
        | member        |
        | first process |
        | core          |
        | worker        |
        | guard         |

    @R039
    Scenario Outline: The engine <death> while a client is reading
      Given an engine that takes half a second to load
      And it generates for a minute
      And hive is serving
      And a chat is streaming
      When the engine <death>
      Then the client knows within 2 seconds
      And at that moment the model is not ready
      And the stream ends with the error WORKER_CRASHED
      And the worker becomes ready again

      Examples:
        | death                                 |
        | exits with success though nobody asked |
        | crashes with a segmentation fault     |
        | dies of a CUDA error                  |

  Rule: A client can always tell a whole answer from a broken one

    @R039
    Scenario: It dies inside an event
      Given an engine that generates for a minute
      And hive is serving
      And a chat is streaming
      When the engine dies in the middle of an event
      Then the stream is cut off, without an error and without an end
      And the client knows within 2 seconds

    @R039
    Scenario: It dies before the first token of a stream
      Given an engine that never comes to the first token
      And hive is serving
      And a chat waits for its first token
      When the worker's first process is killed
      Then it is refused with 502 WORKER_CRASHED
      And it is told what to do

    @R039
    Scenario: It dies before an answer that is not streamed
      Given an engine that never comes to the first token
      And hive is serving
      And a chat is being generated that is not streamed
      When the worker's first process is killed
      Then it is refused with 502 WORKER_CRASHED

  Rule: A broken answer of a living engine is not called a crash

    @R039
    Scenario: It closes the connection and lives on
      Given an engine that generates for a minute
      And hive is serving
      And a chat is streaming
      When the engine closes the connection and lives on
      Then the stream ends with the error BAD_GATEWAY
      And the worker stays ready

    @R039
    Scenario Outline: The engine <breaks>
      Given an engine that <breaks>
      And hive is serving
      When a client asks for a chat
      Then it is refused with 502 BAD_GATEWAY
      And the worker stays ready

      Examples:
        | breaks                      |
        | breaks its status line      |
        | breaks the size of a chunk  |
        | promises more than it sends |

    @R039
    Scenario: It breaks an event off and lives on
      Given an engine that generates for a minute
      And hive is serving
      And a chat is streaming
      When the engine closes the connection in the middle of an event and lives on
      Then the stream is cut off, without an error and without an end
      And the worker stays ready
