@double
Feature: The disk fails
  Disks fill up, break, slow down and hang. Whatever the disk does, a window is whole or was never
  there, what is told is true, and whoever needs no disk does not notice.

  Rule: What fails for a moment is tried again

    @R128 @R101 @R089
    Scenario Outline: Of <calls> of <place> 3 in 10 fail
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      And 3 in 10 <calls> of <place> fail with EIO
      When a client freezes the session as "monday"
      Then each attempt that failed is in the log
      When the disk works again
      Then "monday" is whole

      Examples:
        | calls                        | place               |
        | links and syncs              | blocks              |
        | reads                        | blocks              |
        | opens and writes and syncs   | the manifest        |
        | renames                      | the window's folder |
        | links and renames and writes | the manifest        |

    @R101
    Scenario Outline: The first <calls> of <place> fail in a freeze
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      And the first 2 <calls> of <place> fail with EIO
      When a client freezes the session as "monday"
      Then it was tried 3 times
      And "monday" is whole

      Examples:
        | calls   | place                  |
        | writes  | the manifest           |
        | renames | the window's folder    |
        | syncs   | the windows' directory |

    Scenario: The manifest is written in small parts
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      And writes of the manifest are cut short
      When a client freezes the session as "monday"
      Then "monday" is whole

    @R089
    Scenario: What a failed sync may have lost is stored anew, not synced again
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      When a client freezes the session as "monday" and goes on with it
      And the first 1 syncs of block 3 fail with EIO
      And a client freezes the session as "tuesday"
      Then "tuesday" is whole
      And both windows share every block but block 3

    @R090 @R101
    Scenario Outline: The first reads of <place> fail
      Given hive is serving a model with windows, on a disk that may fail
      And a session that is frozen as "monday"
      And the first 2 reads of <place> fail with EIO
      When a client thaws "monday", all of it or nothing
      Then it has every block
      And each attempt that failed is in the log

      Examples:
        | place        |
        | block 3      |
        | the manifest |

  Rule: What fails for good has not happened

    @R107 @R089 @R101
    Scenario Outline: All <calls> of <place> fail with <error>
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      And all <calls> of <place> fail with <error>
      When a client freezes the session as "monday"
      Then it is refused with 500 STORAGE_WRITE_FAILED
      And its number is CWM-4001
      And it was tried 8 times
      When the disk works again
      Then nothing is left of it
      And the session takes requests
      And a client can freeze the session as "monday"

      Examples:
        | calls   | place        | error  |
        | links   | blocks       | EIO    |
        | syncs   | blocks       | EIO    |
        | links   | blocks       | EROFS  |
        | opens   | the manifest | EACCES |
        | writes  | the manifest | EIO    |
        | renames | the manifest | EIO    |

    @R107
    Scenario Outline: What is half made cannot be removed, either: <calls> of <place>
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      And all <calls> of <place> fail with EIO
      When a client freezes the session as "monday"
      Then it is refused with 500 STORAGE_WRITE_FAILED
      And the session takes requests
      When the disk works again
      Then nothing is left of it
      And a client can freeze the session as "monday"

      Examples:
        | calls   | place                  |
        | renames | the window's folder    |
        | syncs   | the windows' directory |

    @R031
    Scenario Outline: The disk is full: <calls> of <place>
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      And all <calls> of <place> fail with ENOSPC
      When a client freezes the session as "monday"
      Then it is refused with 507 INSUFFICIENT_DISK
      And it says how many bytes are needed, and how many are free
      And it was tried only once
      And nothing is left of it
      And the session takes requests

      Examples:
        | calls  | place        |
        | links  | blocks       |
        | syncs  | blocks       |
        | writes | the manifest |

    @R091 @R102
    Scenario: The disk quota of hive's user is used up
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      And all writes of the manifest fail with EDQUOT
      When a client freezes the session as "monday"
      Then it is refused with 507 STORAGE_QUOTA_EXCEEDED
      And its number is CWM-4003
      And it was tried only once
      And nothing is left of it

    @R107 @R101
    Scenario: A thaw cannot link what LMCache has lost
      Given hive is serving a model with windows, on a disk that may fail
      And a session that is frozen as "monday"
      And LMCache has lost every file
      And all renames of the KV tier fail with EIO
      When a client thaws "monday"
      Then it is refused with 500 STORAGE_WRITE_FAILED
      And it was tried 3 times
      And there are as many sessions as before
      When the disk works again
      And a client thaws "monday", all of it or nothing
      Then it has every block

    @R118 @R107
    Scenario: A repair cannot be written down
      Given hive is serving a model with windows, on a disk that may fail
      And a session that is frozen as "monday"
      And block 3 is missing in the window
      And LMCache has lost every file
      And all renames of the manifest fail with EIO
      When a client repairs "monday"
      Then it is refused with 500 STORAGE_WRITE_FAILED
      When the disk works again
      And a client repairs "monday"
      And a client thaws "monday", all of it or nothing
      Then it has every block

    @R107
    Scenario: A clone cannot be written
      Given hive is serving a model with windows, on a disk that may fail
      And a session that is frozen as "monday"
      And all links of blocks fail with EIO
      When a client clones "monday"
      Then it is refused with 500 STORAGE_WRITE_FAILED
      When the disk works again
      And a client verifies "monday"
      Then the answer is 200

    Scenario: A window cannot be removed
      Given hive is serving a model with windows, on a disk that may fail
      And a session that is frozen as "monday"
      And all syncs of the windows' directory fail with EIO
      When a client removes "monday"
      Then it is refused with 500 STORAGE_WRITE_FAILED
      When the disk works again
      Then nothing is left of it

  Rule: What cannot be read is told, never guessed and never thrown away

    @R103 @R105 @R090
    Scenario: One block cannot be read
      Given hive is serving a model with windows, on a disk that may fail
      And a session that is frozen as "monday"
      And all reads of block 3 fail with EIO
      When a client verifies "monday"
      Then it finds block "000003-0" damaged
      When engine and LMCache are started anew, and remember nothing
      And a client thaws "monday"
      Then the receipt ends before block 3, and says that it is partial
      And after the next request the engine's own count is what the receipt promised
      And block 3 is still in the window
      And the log names the block
      When the disk works again
      And a client thaws "monday", all of it or nothing
      Then it has every block

    @R127
    Scenario Outline: <what> is told by its number
      Given hive is serving a model with windows, on a disk that may fail
      And a session that is frozen as "monday"
      And another session in which something was answered
      And all <calls> of <place> fail with <error>
      When a client <does>
      Then it is refused with <status> <code>
      And its number is <number>

      Examples:
        | what             | calls       | place        | error        | does                              | status | code                 | number   |
        | A write error    | writes      | the manifest | EIO          | freezes the session as "tuesday"  | 500    | STORAGE_WRITE_FAILED | CWM-4001 |
        | A read error     | opens       | blocks       | EACCES       | thaws "monday"                    | 500    | STORAGE_READ_FAILED  | CWM-4002 |
        | No manifest      | reads       | the manifest | EIO          | thaws "monday"                    | 500    | STORAGE_READ_FAILED  | CWM-4002 |
        | A lost engine    | connections | the engine   | ECONNREFUSED | freezes the session as "tuesday"  | 502    | ENGINE_UNREACHABLE   | CWM-5001 |

    @R092
    Scenario: A bit is not what it was, and all of the window is wanted
      Given hive is serving a model with windows, on a disk that may fail
      And a session that is frozen as "monday"
      And a bit is flipped in whatever is read of block 3
      When a client thaws "monday", all of it or nothing
      Then it is refused with 500 STORAGE_CORRUPTED
      And its number is CWM-4004
      And it names block "000003-0"
      And the damaged block is not in the KV tier

    @R092 @R105
    Scenario: A bit is not what it was, and what is whole is enough
      Given hive is serving a model with windows, on a disk that may fail
      And a session that is frozen as "monday"
      And a bit is flipped in whatever is read of block 3
      When a client verifies "monday"
      Then it finds block "000003-0" damaged
      And the log names the block
      And the damaged block is not in the KV tier
      When engine and LMCache are started anew, and remember nothing
      And a client thaws "monday"
      Then the receipt ends before block 3, and says that it is partial
      And after the next request the engine's own count is what the receipt promised

    @R118
    Scenario: A missing block is linked again
      Given hive is serving a model with windows, on a disk that may fail
      And a session that is frozen as "monday"
      And block 3 is missing in the window
      And the first 1 links of the KV tier fail with EIO
      When a client repairs "monday"
      Then 1 block was had from the KV tier, and 0 computed again

    @R118 @R092
    Scenario: A missing block is not had from a bad copy
      Given hive is serving a model with windows, on a disk that may fail
      And a session that is frozen as "monday"
      And block 3 is missing in the window
      And a bit is flipped in the first read of what is linked again
      When a client repairs "monday"
      Then 0 blocks were had from the KV tier, and 1 computed again
      When a client thaws "monday", all of it or nothing
      Then it has every block

  Rule: A disk that is slow or hangs holds up nobody else

    Scenario: A slow disk
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      And each sync of blocks takes 0.15 s
      When a client begins to freeze the session as "monday"
      And the disk is at it
      Then clients are answered at normal speed
      And its progress goes on, block by block
      And the guards and engines met nothing

    Scenario Outline: A disk that hangs for a while: <calls> of <place>
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      And <calls> of <place> hang
      When a client begins to freeze the session as "monday"
      And the disk is at it
      Then clients are answered at normal speed
      And the freeze is not answered
      When the disk works again
      Then the freeze comes to its end

      Examples:
        | calls   | place                  |
        | syncs   | blocks                 |
        | reads   | blocks                 |
        | renames | the window's folder    |
        | syncs   | the windows' directory |

    @R107 @R075
    Scenario: A disk that hangs for good
      Given hive is serving a model with windows in haste, on a disk that may fail
      And a session in which something was answered
      And syncs of blocks hang
      When a client begins to freeze the session as "monday"
      Then the freeze ends with OPERATION_TIMEOUT within 5 seconds
      And clients are answered at normal speed
      And the session takes requests
      When syncs of the catalogue hang, too
      And a client is answered in the session
      Then hive stops within 10 seconds, though the disk hangs
      And the log says that the catalogue's disk hangs, and what was not recorded
      When hive is started on a disk that works
      Then nothing is left of it
      And a client can freeze the session as "monday"

    @R107
    Scenario: A disk that hangs for longer than a freeze may take
      Given hive is serving a model with windows in haste, on a disk that may fail
      And a session in which something was answered
      And syncs of blocks hang
      When a client begins to freeze the session as "monday"
      Then the freeze ends with OPERATION_TIMEOUT within 5 seconds
      And what is half made is left alone as long as the disk hangs
      When the disk works again
      Then nothing is left of it
      And a client can freeze the session as "monday"

  Rule: The catalogue's disk fails, and models are served all the same

    Scenario: It cannot be written
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      And all writes and syncs of the catalogue fail with EIO
      When a client freezes the session as "monday"
      Then it is refused with 502 STORE_UNREACHABLE
      And its number is CWM-5003
      And a chat without a session is answered
      When the disk works again
      Then nothing is left of it
      And a client can freeze the session as "monday"

    @R107
    Scenario: It cannot be written any more when everything else is done
      Given hive is serving a model with windows, on a disk that may fail
      And a session in which something was answered
      And syncs of the windows' directory hang
      When a client begins to freeze the session as "monday"
      And the disk is at it
      And the disk of the catalogue fails, and the other one goes on
      Then the freeze ends with STORE_UNREACHABLE within 10 seconds
      And a chat without a session is answered
      When the disk works again
      Then nothing is left of it
      And the session takes requests
      And a client can freeze the session as "monday"
