@double
Feature: The catalogue in PostgreSQL
  One setting, windows.catalogue_url, and sessions and windows are rows of a PostgreSQL database; the
  blocks stay on hive's disk. A database that is away costs what needs it a coded error, in time.

  Rule: A URL takes the place of the file

    @R106
    Scenario: A conversation goes on after a restart
      Given the catalogue is a PostgreSQL database
      And hive is serving a model with windows
      And a session that is frozen as "monday"
      When hive is stopped and started again
      And a client thaws "monday"
      Then it has the messages, and a receipt for every full chunk
      And after the next request the window's receipt has the engine's own count
      And there is no catalogue in hive's state directory

    Scenario: The database is lost
      Given the catalogue is a PostgreSQL database
      And hive is serving a model with windows
      And a session that is frozen as "monday"
      When hive is stopped, the database is made anew, and hive is started again
      And a client thaws "monday"
      Then it has the messages, and a receipt for every full chunk

    Scenario: It is another hive's
      Given the catalogue is a PostgreSQL database
      And hive is serving a model with windows
      When another hive is started with the same database
      Then it ends with exit code 1
      And its last line is the error CONFIG_INVALID, for programs to read
      And it names "belongs to another hive"

  Rule: Only what needs it fails, in time, and by itself it is served again

    @R076 @R171
    Scenario Outline: PostgreSQL <fails> while hive runs
      Given the catalogue is a PostgreSQL database
      And hive is serving a model with windows
      And a session that is frozen as "monday"
      And another session in which something was answered
      And its answer is written down
      When PostgreSQL <fails>
      Then freeze, thaw, list and a chat in a session are refused with STORE_UNREACHABLE within 6 seconds
      And chats without a session are answered meanwhile
      When PostgreSQL is back
      Then a client can freeze the session as "tuesday"
      And the windows are "monday, tuesday"
      And the database's password is in no log

      Examples:
        | fails |
        | hangs |
        | ends  |

    @R076
    Scenario Outline: PostgreSQL is not there when <command> is run
      Given the catalogue is a PostgreSQL database
      And hive has a model with windows
      And PostgreSQL has ended
      When the operator runs <command> for it
      Then it ends with exit code 1
      And its last line is the error STORE_UNREACHABLE, for programs to read
      And it names the database, and not its password

      Examples:
        | command    |
        | hive serve |
        | hive check |
