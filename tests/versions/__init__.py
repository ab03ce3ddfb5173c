"""Lock what `make test` and `make demo` install, and run the tests with other versions."""
