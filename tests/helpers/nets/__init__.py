"""The nets of the tests, a file for each."""
