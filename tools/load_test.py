"""Put load on a running server and measure it (see --help)."""

from opt_megatron.benchmark.load import main

if __name__ == "__main__":
    main()
