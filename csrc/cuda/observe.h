#pragma once

#include "core/walk.h"
#include "cuda/accumulator.h"
#include "cuda/driver.h"
#include "cuda/values.h"
#include "gpu.h"

// Statistics of a tensor in one pass over memory. A block processes items. An item is a part of the
// values of one group: a channel, or some channels that are adjacent in memory. A block that reads
// all values of a group adds to their statistic on its own. Where groups are split among blocks,
// the launch is cooperative: all blocks compute the new window, wait for each other, and add with
// atomics.
namespace torch_ext::cuda {

// How a tensor is cut into items.
struct Cut {
  core::Walk walk;         // over units
  int64_t units;           // of a channel: packets of 16 bytes where these are aligned, else values
  int64_t values;          // of a channel
  int64_t whole;           // full units; only the last can be partial
  int64_t channel_stride;  // in elements
  int32_t per_unit;        // values
  int32_t group_channels;  // channels of a group: a power of two
  int64_t groups;          // of channels
  int64_t splits;          // of each group's values
};

template <class T, class Table>
struct Observe {
  static constexpr int kThreads = 512;
  // A thread has so many values in registers, and as many more are being loaded.
  static constexpr int kValues = sizeof(T) == 8 ? 4 : sizeof(T) == 4 ? 12 : 16;
  static constexpr int kPackets = kValues / kPerPacket<T>;

  const T* data;
  Cut cut;
  Statistic into;
  ObserveMode mode;
  Partial* partials;  // [groups, splits, together], where splits > 1
  uint32_t* scratch;  // counters of each block that are not in shared memory

  TE_GPU void operator()() const {
    if (mode.unless != nullptr && *mode.unless != 0) return;
    BlockState& state = *static_cast<BlockState*>(gpu::shared());
    Accumulator<Table, kThreads, kValues> block(state, table(), into.layout, cut.group_channels);
    if (cut.splits > 1) return split(block, state);
    for (int64_t group = gpu::block(); group < cut.groups; group += gpu::blocks()) {
      accumulate(block, group, 0);
      for (int c = 0; c < channels_of(group); ++c) add_alone(state, group, c);
      gpu::sync();
    }
  }

 private:
  using Block = Accumulator<Table, kThreads, kValues>;

  TE_GPU int64_t table_size() const { return cut.group_channels * into.layout.size(); }
  TE_GPU Table table() const {
    uint32_t* const on_chip =
        reinterpret_cast<uint32_t*>(static_cast<BlockState*>(gpu::shared()) + 1);
    uint32_t* const own = scratch + gpu::block() * table_size();
    if constexpr (std::is_same_v<Table, WideTable>) {
      return {scratch != nullptr ? own : on_chip};
    } else if constexpr (std::is_same_v<Table, NarrowTable>) {
      return {on_chip, own};
    } else {
      return {};
    }
  }
  TE_GPU int channels_of(int64_t group) const {
    const int64_t left = into.channels - group * cut.group_channels;
    return static_cast<int>(left < cut.group_channels ? left : cut.group_channels);
  }
  TE_GPU core::ChannelStatistic target(int64_t group, int c) const {
    return into.channel(group * cut.group_channels + c);
  }
  TE_GPU int32_t old_top(int64_t group, int c) const {
    if (mode.fresh || c >= channels_of(group) || into.layout.octaves == 0) return 0;
    const float* extrema = target(group, c).extrema;
    return core::top_octave(extrema[0], extrema[1]);
  }

  // ---- reading

  TE_GPU void accumulate(Block& block, int64_t group, int64_t part) const {
    block.start([&](int c) { return old_top(group, c); });
    const int c = gpu::thread() % cut.group_channels, row = gpu::thread() / cut.group_channels;
    const bool mine = c < channels_of(group);
    const T* const base = data + (group * cut.group_channels + c) * cut.channel_stride;
    const int64_t begin = cut.units / cut.splits * part + smaller_of(part, cut.units % cut.splits);
    const int64_t end = begin + cut.units / cut.splits + (part < cut.units % cut.splits ? 1 : 0);
    Reader reader{*this, base, begin + row, mine ? end : 0, kThreads / cut.group_channels};
    const int64_t per_chunk = int64_t{reader.rows} * (kValues / cut.per_unit);
    for (int64_t left = end - begin; left > 0; left -= per_chunk) {
      if (left == end - begin) reader.load();
      float x[kValues];
      const int padding = reader.decode(x);
      // The next chunk is loaded while this one is counted.
      if (left > per_chunk) reader.load();
      block.add(x, padding);
    }
    block.finish();
  }
  TE_GPU static int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

  // Loads a packet with only the first `left` values; the others are NaN.
  struct PartialPacket {
    const T* at;
    TE_GPU gpu::Packet operator()(int left) const {
      gpu::Packet packet{};
      for (int k = 0; k < kPerPacket<T>; ++k)
        set_element(packet, k, k < left ? at[k] : nan_of<T>());
      return packet;
    }
  };

  // Loads one thread's values, a chunk ahead of their use.
  struct Reader {
    const Observe& from;
    const T* base;
    int64_t at, end;  // units
    int rows;         // between the units of a thread
    gpu::Packet next[kPackets] = {};
    int padding = 0;

    TE_GPU void load() {
      padding = 0;
      if (from.cut.per_unit == 1)
        load_values();
      else
        load_packets();
      at += int64_t{rows} * (kValues / from.cut.per_unit);
    }
    TE_GPU void load_packets() {
#pragma unroll
      for (int i = 0; i < kPackets; ++i) {
        const int64_t unit = at + int64_t{i} * rows;
        if (unit < end && unit < from.cut.whole) {
          next[i] = gpu::load(base + from.offset(unit));
        } else {
          // Past the end, or the last, partial packet.
          const int64_t left = unit < end ? from.cut.values - unit * kPerPacket<T> : 0;
          next[i] = gpu::call_noinline(PartialPacket{base + unit * kPerPacket<T>},
                                       static_cast<int>(left));
          padding += kPerPacket<T> - static_cast<int>(left);
        }
      }
    }
    TE_GPU void load_values() {
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const int64_t unit = at + int64_t{i} * rows;
        const bool exists = unit < end;
        padding += exists ? 0 : 1;
        set_element(next[i / kPerPacket<T>], i % kPerPacket<T>,
                    exists ? base[from.offset(unit)] : nan_of<T>());
      }
    }
    TE_GPU int decode(float (&x)[kValues]) const {
#pragma unroll
      for (int i = 0; i < kValues; ++i)
        x[i] = observed(element<T>(next[i / kPerPacket<T>], i % kPerPacket<T>));
      return padding;
    }
  };

  // Offset of a unit, in elements. The variant with divisions is not inlined, because every load
  // would repeat it.
  TE_GPU int64_t offset(int64_t unit) const {
    if (cut.walk.count == 1) return unit * cut.walk.dims[0].stride;
    return gpu::call_noinline(cut.walk, unit);
  }

  // ---- a group that one block reads

  TE_GPU void add_alone(BlockState& state, int64_t group, int c) const {
    const core::ChannelStatistic to = target(group, c);
    Partial& total = state.totals[c];
    if constexpr (kCounts<Table>) {
      // The block's window started as the statistic's, so it ended as the one that the statistic
      // needs now.
      if (!mode.fresh) raise_window(to, old_top(group, c), state.top[c], total);
      gpu::sync();
      const Table counters = table();
      int64_t kept = 0;
      for (int64_t bin = gpu::thread(); bin < into.layout.size(); bin += kThreads) {
        const int64_t n = counters.take(c * into.layout.size() + bin);
        kept += n;
        if (mode.fresh)
          to.counts[bin] = n;
        else if (n != 0)
          to.counts[bin] += n;
      }
      if (kept != 0) gpu::add(&total.tally[core::kTiny], -kept);
      gpu::sync();
    }
    if (gpu::thread() == 0) write(to, total, total.tally);
  }

  // Clears the slots of the octaves that leave the statistic's window, and counts their values as
  // tiny.
  TE_GPU void raise_window(const core::ChannelStatistic& to, int32_t top, int32_t new_top,
                           Partial& total) const {
    if (top == 0 || new_top <= top) return;
    const int32_t bottom = into.layout.bottom(new_top);
    const int64_t width = int64_t{1} << into.layout.mantissa_bits;
    for (int32_t octave = into.layout.bottom(top); octave < bottom && octave <= top; ++octave) {
      for (int64_t k = gpu::thread(); k < 2 * width; k += kThreads) {
        int64_t& n = to.counts[into.layout.octave_begin(octave) +
                               (k < width ? k : k - width + into.layout.bins())];
        if (n != 0) gpu::add(&total.tally[core::kTiny], n);
        n = 0;
      }
    }
  }

  TE_GPU void write(const core::ChannelStatistic& to, const Partial& total,
                    const int64_t (&tally)[core::kTallyColumns]) const {
    write_extrema(to, total);
    for (int column = 0; column < core::kTallyColumns; ++column)
      to.tally[column] = (mode.fresh ? 0 : to.tally[column]) + tally[column];
  }
  TE_GPU void write_extrema(const core::ChannelStatistic& to, const Partial& total) const {
    const float lo = core::float_of_key(total.min_key), hi = core::float_of_key(total.max_key);
    if (mode.fresh || total.min_key < core::key_of(to.extrema[0]))
      to.extrema[0] = core::positive_zero(lo);
    if (mode.fresh || total.max_key > core::key_of(to.extrema[1]))
      to.extrema[1] = core::positive_zero(hi);
  }

  // ---- a group that several blocks read

  TE_GPU void split(Block& block, BlockState& state) const {
    const int64_t group = gpu::block() / cut.splits, part = gpu::block() % cut.splits;
    accumulate(block, group, part);
    Partial* const shares = partials + group * cut.splits * cut.group_channels;
    if (gpu::thread() < cut.group_channels)
      shares[part * cut.group_channels + gpu::thread()] = state.totals[gpu::thread()];
    if (kCounts<Table> && mode.fresh) clear_part(group, part);
    gpu::sync_blocks();
    // From here on state.totals is that of all blocks of the group.
    if (gpu::thread() < cut.group_channels) state.totals[gpu::thread()] = kNothing;
    gpu::sync();
    for (int64_t i = gpu::thread(); i < cut.splits * cut.group_channels; i += kThreads)
      Block::combine(state.totals[i % cut.group_channels], shares[i]);
    gpu::sync();
    if constexpr (kCounts<Table>) {
      if (gpu::thread() < cut.group_channels)
        state.next_top[gpu::thread()] = common_top(state, group, gpu::thread());
      gpu::sync();
      if (part == 0) write_tallies(state, group);
      gpu::sync_blocks();
      for (int c = 0; c < channels_of(group); ++c) add_shared(state, group, c);
      if (part == 0 && gpu::thread() < channels_of(group))
        write_extrema(target(group, gpu::thread()), state.totals[gpu::thread()]);
    } else if (part == 0 && gpu::thread() < channels_of(group)) {
      const Partial& total = state.totals[gpu::thread()];
      write(target(group, gpu::thread()), total, total.tally);
    }
  }

  TE_GPU void clear_part(int64_t group, int64_t part) const {
    const int64_t size = channels_of(group) * into.layout.size();
    int64_t* const counts = target(group, 0).counts;
    for (int64_t i = part * kThreads + gpu::thread(); i < size; i += cut.splits * kThreads)
      counts[i] = 0;
  }

  // Top octave of the statistic's window with the values of all blocks.
  TE_GPU int32_t common_top(const BlockState& state, int64_t group, int c) const {
    const Partial& total = state.totals[c];
    const int32_t top =
        core::top_octave(core::float_of_key(total.min_key), core::float_of_key(total.max_key));
    const int32_t old = old_top(group, c);
    return top > old ? top : old;
  }

  TE_GPU void write_tallies(BlockState& state, int64_t group) const {
    for (int c = 0; c < channels_of(group); ++c)
      if (!mode.fresh)
        raise_window(target(group, c), old_top(group, c), state.next_top[c], state.totals[c]);
    gpu::sync();
    if (gpu::thread() >= channels_of(group)) return;
    const core::ChannelStatistic to = target(group, gpu::thread());
    for (int column = 0; column < core::kTallyColumns; ++column)
      to.tally[column] =
          (mode.fresh ? 0 : to.tally[column]) + state.totals[gpu::thread()].tally[column];
  }

  // Adds the block's counters to the statistic's with atomics: other blocks do so at the same time.
  TE_GPU void add_shared(const BlockState& state, int64_t group, int c) const {
    if (state.top[c] == 0) return;
    const core::ChannelStatistic to = target(group, c);
    const Table counters = table();
    const int64_t width = int64_t{1} << into.layout.mantissa_bits;
    const int32_t bottom = into.layout.bottom(state.next_top[c]);
    int64_t kept = 0;
    for (int32_t octave = into.layout.bottom(state.top[c]); octave <= state.top[c]; ++octave) {
      if (octave < bottom) continue;
      for (int64_t k = gpu::thread(); k < 2 * width; k += kThreads) {
        const int64_t bin =
            into.layout.octave_begin(octave) + (k < width ? k : k - width + into.layout.bins());
        const int64_t n = counters.take(c * into.layout.size() + bin);
        kept += n;
        if (n != 0) gpu::add(to.counts + bin, n);
      }
    }
    if (kept != 0) gpu::add(to.tally + core::kTiny, -kept);
  }
};

}  // namespace torch_ext::cuda
