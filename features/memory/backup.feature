@double
Feature: Backing windows up
  A backup is a window as one file: it can be kept elsewhere, had again after the window is lost, and
  taken to another hive. Nothing in it is believed before it was checked.

  Rule: A backup brings a window back

    @R124 @R125 @R126
    Scenario: The operator brings back a window that was deleted
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      When the operator runs "backup create monday"
      Then the command ends with 0
      When a client deletes "monday"
      And the operator runs "backup list --window monday"
      Then the command ends with 0
      And it prints "monday"
      When the operator runs "backup restore --window monday"
      Then the command ends with 0
      When the operator runs "window status monday"
      Then the command ends with 0
      And it prints "FROZEN"

    @R125
    Scenario: What was restored is what was frozen
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And a backup of "monday"
      When a client deletes "monday"
      And hive is stopped, the KV tier is emptied, and hive is started again
      And a client restores "monday"
      And a client thaws "monday"
      Then it has the messages, and a receipt for every full chunk
      And after the next request the window's receipt has the engine's own count

    @R125
    Scenario: An older one of several
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And a backup of "monday"
      And another backup of "monday"
      When a client restores the first backup of "monday" as "earlier"
      Then the answer is 201
      And it is restored from the first backup

    Scenario: The name is taken
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And a backup of "monday"
      When a client restores "monday"
      Then it is refused with 409 WINDOW_ALREADY_EXISTS
      And the answer names "--name"
      When a client restores "monday" as "tuesday"
      Then the answer is 201

    Scenario: Deleted, it is gone, and the window stays
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And a backup of "monday"
      When a client deletes the backup of "monday"
      Then there is no backup
      When a client thaws "monday"
      Then it has the messages, and a receipt for every full chunk

  Rule: It goes to another hive as a file

    @R125
    Scenario: Copied, restored and thawed there
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And a backup of "monday"
      When hive is stopped, and its backups are copied to another hive
      And a client restores "monday"
      And a client thaws "monday"
      Then it has the messages, and a receipt for every full chunk
      And after the next request the window's receipt has the engine's own count

    Scenario: Its model is another one there
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And a backup of "monday"
      When hive is stopped, and its backups are copied to another hive with "--dtype=float32" for the engine
      And a client restores "monday"
      And a client thaws "monday"
      Then it is refused with 409 MODEL_INCOMPATIBLE
      And the answer names "dtype"

  Rule: It is its owner's

    @R084
    Scenario: Another key neither sees nor restores it
      Given a key "ann" for inference
      And a key "bob" for inference
      And a key "operator" for admin
      And hive is serving a model with windows
      And "ann" has a session that is frozen as "monday"
      And "ann" has a backup of "monday"
      When "bob" restores "monday" as "mine"
      Then it is refused with 404 NOT_FOUND
      And "bob" sees no backups
      And "bob" sees no windows

    @R076
    Scenario: What protects the session is told to nobody
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And a backup of "monday"
      Then the session's salt is in the backup, which is for hive's user alone
      And neither the answer, the list nor the log has it

  Rule: Damaged, it is told and nothing is left

    @R092 @R107
    Scenario: One bit of a block is flipped
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And a backup of "monday"
      When one bit of its third block in the backup is flipped
      And a client restores "monday" as "again"
      Then it is refused with 500 STORAGE_CORRUPTED
      And its number is CWM-4004
      And the answer names "block 000002-0"
      And "monday" is the only window, and its folder the only one

    @R092
    Scenario: A copy was cut off
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And a backup of "monday"
      When the last byte of the backup is missing
      And the operator runs "backup list"
      Then the command ends with 0
      And it prints "not whole"
      When a client restores "monday" as "again"
      Then it is refused with 500 STORAGE_CORRUPTED
      And "monday" is the only window, and its folder the only one

    @R092
    Scenario: A damaged window is not backed up
      Given hive is serving a model with windows
      And a session that is frozen as "monday"
      And block 3 of "monday" is damaged
      When a client backs "monday" up
      Then it is refused with 500 STORAGE_CORRUPTED
      And the answer names "block 000003-0"
      And there is no backup, nor half of one
      And the damaged block is not in the KV tier

    @R107
    Scenario: The disk of the backups is full
      Given a disk for the backups that takes no more files
      And hive is serving a model with windows
      And a session that is frozen as "monday"
      When a client backs "monday" up
      Then it is refused with 507 INSUFFICIENT_DISK
      And the answer names "windows.backup_dir"
      And there is no backup, nor half of one

    @R107
    Scenario: hive was killed while it wrote one
      Given hive will be killed when it has written half of a backup
      And hive is serving a model with windows
      And a session that is frozen as "monday"
      When a client backs "monday" up, and hive is killed
      Then half of a backup is there
      When hive is started again, whole
      Then there is no backup, nor half of one
      When a client backs "monday" up
      Then the answer is 201
